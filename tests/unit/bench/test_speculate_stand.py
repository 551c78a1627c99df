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


def test_all_of_it_is_made_by_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same path with few steps and small shapes; killed behind any part it goes on from there."""
    for name, count in (("LEARNED", 40), ("PROMPTS", 4), ("TESTED", 5)):
        monkeypatch.setattr(speculate_stand, name, count)
    monkeypatch.setattr(speculate_stand, "GROWN", {"width": 192, "layers": 7, "mlp_width": 400})
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setattr(speculate_stand, "DRAWN", speculate_stand.DRAWN | small)
    folder = make_stand(tmp_path / "stand", steps=(2, 2, 2))
    family = read_family(folder)
    assert list(family.members) == ["told", "retold"] and family.row("told").speaker == "base"
    assert family.module("base").parameters > 10 * family.module(DRAFT).parameters
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "stand").rglob("*.safetensors")}
    assert make_stand(tmp_path / "stand", steps=(2, 2, 2)) == folder
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "stand").rglob("*.safetensors")} == made
