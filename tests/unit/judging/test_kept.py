"""What is kept of a prompt comes back; what is damaged is made again; other facts are another folder."""

from pathlib import Path

import torch

from heliostat.judging.kept import Kept
from heliostat.judging.labels import Scored


def test_it_comes_back(tmp_path: Path) -> None:
    kept = Kept.open(tmp_path, {"draft": "a"})
    assert kept.scored(3) is None and kept.changed(3) is None
    scored = Scored(torch.tensor([1, 4]), torch.tensor([7, 9]), torch.tensor([-0.5, 2]), torch.randn(2, 3))
    kept.keep(3, scored)
    kept.keep_changed(3, [True, False])
    kept.keep_changed(4, None)
    again = Kept.open(tmp_path, {"draft": "a"})
    found = again.scored(3)
    assert found is not None and torch.equal(found.hidden, scored.hidden)
    assert found.places.tolist() == [1, 4] and found.tokens.tolist() == [7, 9]
    assert again.changed(3) == [True, False] and again.changed(4) == []


def test_what_is_damaged_is_not_there(tmp_path: Path) -> None:
    kept = Kept.open(tmp_path, {})
    kept.keep(1, Scored(torch.tensor([0]), torch.tensor([0]), torch.zeros(1), torch.zeros(1, 2)))
    (file,) = kept.folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    assert kept.scored(1) is None


def test_other_facts_are_another_folder(tmp_path: Path) -> None:
    assert Kept.open(tmp_path, {"draft": "a"}).folder != Kept.open(tmp_path, {"draft": "b"}).folder
