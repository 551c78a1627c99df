"""The benchmark of decoding runs whole and says what it measured; no number of it is judged here."""

import json
import sys
from pathlib import Path

import pytest

from heliostat.bench import decode

TINY = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}


def test_the_table_has_a_line_for_every_batch_and_a_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr(decode, "BATCHES", (1, 2))
    monkeypatch.setattr(decode, "STEPS", 16)
    monkeypatch.setattr(decode, "bandwidth", lambda device: 1e9)
    monkeypatch.setattr(
        sys, "argv", ["decode", "--models", "tiny", "--repeats", "1", "--docs", str(tmp_path)]
    )
    decode.main()
    page = (tmp_path / "decode.md").read_text(encoding="utf-8")
    assert page.count("| tiny |") == 2 and "--models tiny" in page
    rows = json.loads((tmp_path / "decode.json").read_text(encoding="utf-8"))["rows"]
    assert all(row["engine"] > 0 and row["bare"] > 0 for row in rows)
    assert 0 < rows[-1]["planning"] < 1


def test_fresh_prompts_are_fresh() -> None:
    assert decode.prompts(2, 0) == decode.prompts(2, 0)
    assert not {tuple(p) for p in decode.prompts(4, 0)} & {tuple(p) for p in decode.prompts(4, 1)}
