"""Calibration: every kind of data becomes rows, some held out; what cannot serve is refused with its place."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.errors import Refused
from heliostat.model.config import ModelConfig, read_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.quantize.calibration import batches, read_calibration


@pytest.fixture(scope="module")
def config(tiny_base: Path) -> ModelConfig:
    return read_config(tiny_base)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.load(tiny_base)


def lines(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


KINDS: dict[str, list[dict[str, Any]]] = {
    "text.jsonl": [{"text": f"one two three {n}"} for n in range(60)],
    "asked.jsonl": [{"prompt": f"add {n} and 2", "completion": str(n + 2)} for n in range(60)],
    "said.jsonl": [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": str(n)}]}
        for n in range(60)
    ],
}


@pytest.mark.parametrize("name", [*KINDS, "plain.txt"])
def test_every_kind_of_data(name: str, tmp_path: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    if name in KINDS:
        path = lines(tmp_path / name, KINDS[name])
    else:
        path = tmp_path / name
        path.write_text("\n\n".join(f"a text of its own, number {n}" for n in range(60)), encoding="utf-8")
    found = read_calibration(path, tokenizer, config, tokens=10_000, seed=0)
    rows = len(found.fitted.ids) + len(found.held_out.ids)
    assert len(found.held_out.ids) == max(1, rows // 8)
    assert torch.equal(
        found.fitted.ids, read_calibration(path, tokenizer, config, tokens=10_000, seed=0).fitted.ids
    )
    other = read_calibration(path, tokenizer, config, tokens=10_000, seed=1)
    assert not torch.equal(found.fitted.ids[:4], other.fitted.ids[:4])
    assert sum(ids.numel() for ids, _, _ in batches(found.fitted, 3)) == found.tokens


def test_no_more_than_is_asked_for(tmp_path: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    path = lines(tmp_path / "d.jsonl", KINDS["text.jsonl"] * 10)
    assert read_calibration(path, tokenizer, config, tokens=200, seed=0).tokens <= 230


def test_what_cannot_serve_is_refused(tmp_path: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    def refused(path: Path, message: str, *, tokens: int = 1000) -> None:
        with pytest.raises(Refused, match=message):
            read_calibration(path, tokenizer, config, tokens=tokens, seed=0)

    refused(tmp_path / "none.jsonl", "cannot be read")
    refused(tmp_path / "none.txt", "cannot be read")
    refused(lines(tmp_path / "empty.jsonl", []), "is empty")
    (tmp_path / "blank.txt").write_text("\n \n\n", encoding="utf-8")
    refused(tmp_path / "blank.txt", "is empty")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path / "bytes.txt", "not UTF-8")
    refused(lines(tmp_path / "bad.jsonl", [{"text": "good"}, {"texts": "bad"}]), "bad.jsonl:2")
    refused(lines(tmp_path / "few.jsonl", [{"text": "only a few words"}]), "widest Linear has 64 inputs")
    refused(lines(tmp_path / "all.jsonl", KINDS["text.jsonl"]), r"raise --tokens \(20\)", tokens=20)


def test_ids_that_the_model_has_not_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, config: ModelConfig
) -> None:
    from dataclasses import replace

    path = lines(tmp_path / "d.jsonl", KINDS["text.jsonl"])
    with pytest.raises(
        Refused, match=r"d.jsonl:1: token id \d+, and the model's ids are 0 to 9: this is not its"
    ):
        read_calibration(path, tokenizer, replace(config, vocabulary=10), tokens=1000, seed=0)
