"""Decode steps of several kinds of attention in turn: every kind takes part, and the first is what it is compared with."""

import pytest
import torch

from heliostat.bench import decode
from heliostat.bench.decode_kinds import KINDS, compare, model_of

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}


def test_every_kind_takes_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr("heliostat.bench.decode_kinds.STEPS", 4)
    rows = compare("tiny", ["softmax", "softmax again", "affine+gated"], [2], 2)
    assert [row["kind"] for row in rows] == ["softmax", "softmax again", "affine+gated"]
    assert rows[0]["ratio"] == 1 and all(row["seconds"] > 0 and row["turns"] == 2 * 4 for row in rows)


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"softmax again"}))
def test_models_are_of_the_kind_that_was_asked_for(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "SHAPES", {"tiny": TINY})
    model = model_of("tiny", kind)
    assert model.config.attention.name == kind
    averages = [b.self_attn.alpha_ma for b in model.blocks if model.config.attention.affine]
    assert all(a.dtype is torch.float32 and a.eq(0.5).all() for a in averages)
