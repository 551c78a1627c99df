"""The stand: the same data every time, the target as the family's base, the draft as its module, nothing made twice."""

from collections.abc import Callable
from pathlib import Path

import pytest

from heliostat.bench import speculate_stand
from heliostat.bench.speculate_stand import DRAFT, make_stand
from heliostat.build import read_family
from heliostat.train.formats import read_jsonl


def test_a_family_of_given_models(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculate_stand, "LEARNED", 30)
    monkeypatch.setattr(speculate_stand, "PROMPTS", 12)
    monkeypatch.setattr(speculate_stand, "TESTED", 9)
    models = {"target": make_checkpoint(), "draft": make_checkpoint(seed=5, num_hidden_layers=1)}
    folder = make_stand(tmp_path / "stand", **models, steps=(1, 1, 0))
    family = read_family(folder)
    assert set(family.modules) == {"base", DRAFT} and not family.members
    assert len(read_jsonl(tmp_path / "stand" / "held-out.jsonl").records) == 9
    written = {p.name: p.read_bytes() for p in (tmp_path / "stand").glob("*.jsonl")}
    assert set(written) == {
        "learn.jsonl",
        "prompts.jsonl",
        "test.jsonl",
        "held-out.jsonl",
        "told.jsonl",
        "retold.jsonl",
    }
    assert make_stand(tmp_path / "stand", **models, steps=(1, 1, 0)) == folder
    make_stand(tmp_path / "again", **models, steps=(1, 1, 0))
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").glob("*.jsonl")} == written
