"""The parts of a decode step are measured whole; no number of them is judged here."""

from pathlib import Path

import pytest

from heliostat.bench import decode, engine

TINY = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}


def test_a_step_has_its_parts_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(decode, "BATCHES", (1, 2))
    monkeypatch.setattr(decode, "STEPS", 8)
    monkeypatch.setattr(decode, "bandwidth", lambda device: 1e9)
    engine.write_model(tmp_path / "tiny", "tiny")
    found = decode.parts(str(tmp_path / "tiny"), 0)
    assert found["step"].keys() == found["bare"].keys() == {"1", "2"}
    assert all(found["bare"][batch] > 0 and found["step"][batch] > 0 for batch in ("1", "2"))
    assert 0 < found["planning"] < found["busy"] and found["memory"] > 0


def test_fresh_prompts_are_fresh() -> None:
    assert decode.prompts(2, 0) == decode.prompts(2, 0)
    assert not {tuple(p) for p in decode.prompts(4, 0)} & {tuple(p) for p in decode.prompts(4, 1)}
