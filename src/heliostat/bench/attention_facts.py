"""What the heads of a model look at: how much of it is the first token, how spread it is, and a small picture.

Looked at through the seam: queries and keys are what the model itself computed, and the weights are written out.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heliostat.model.seam import NOTHING, Causal
from heliostat.model.transformer import Transformer
from heliostat.ops.mixing import Mix

FROM = 64
"""Queries from this place on count: before it a first token is one of few."""
SHOWN = 20
"""Tokens of a picture's side."""
BATCH = 8


@dataclass(slots=True)
class Looked:
    """What was measured of each row and head [B, H], one entry a batch, by layer."""

    first: dict[int, list[Tensor]] = field(default_factory=dict)
    """Share of the softmax that lies on the first token, sinks counted as nobody's."""
    read: dict[int, list[Tensor]] = field(default_factory=dict)
    """Weight with which the first value is really added: scaled, with its share of the sum, gated."""
    mass: dict[int, list[Tensor]] = field(default_factory=dict)
    """Sum of the weights of a query."""
    entropy: dict[int, list[Tensor]] = field(default_factory=dict)
    """Of the softmax over tokens, nats."""
    pictures: dict[int, list[Tensor]] = field(default_factory=dict)
    """Weights [B, H, SHOWN, SHOWN] of the first queries and keys."""


class Looking:
    """Attends as a whole causal sequence does, and writes down who looked where."""

    def __init__(self, looked: Looked) -> None:
        self.inner, self.looked = Causal(), looked

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mix: Mix = NOTHING) -> Tensor:
        """q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D]."""
        chances, weights = weights_of(q, k, mix)  # [B, H, T, T]
        late = slice(min(FROM, q.shape[1] - 1), None)
        among = chances / chances.sum(-1, keepdim=True).clamp_min(1e-9)
        entropy = -(among * among.clamp_min(1e-9).log()).sum(-1)
        for kept, numbers in (
            (self.looked.first, chances[:, :, late, 0]),
            (self.looked.read, weights[:, :, late, 0]),
            (self.looked.mass, weights[:, :, late].sum(-1)),
            (self.looked.entropy, entropy[:, :, late]),
        ):
            kept.setdefault(layer, []).append(numbers.mean(2))
        self.looked.pictures.setdefault(layer, []).append(weights[:, :, :SHOWN, :SHOWN])
        return self.inner(layer, q, k, v, mix)


def weights_of(q: Tensor, k: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """q [B, T, H, D], k [B, T, K, D] -> softmax over the tokens, and what values are added with, both [B, H, T, T].

    The softmax is with its sink, if there is one: then it sums to less than one.
    """
    heads, length = q.shape[2], q.shape[1]
    keys = k.float().repeat_interleave(heads // k.shape[2], dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q.float(), keys) * q.shape[-1] ** -0.5
    mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    if mix.sinks is not None:
        sinks = mix.sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        chances = torch.cat([scores, sinks], -1).softmax(-1)[..., :length]
    else:
        chances = scores.softmax(-1)
    weights = chances
    if mix.alpha is not None and mix.average is not None:
        alpha = mix.alpha.float().expand(q.shape[:3]).transpose(1, 2)[..., None]  # [B, H, T, 1]
        seen = torch.arange(1, length + 1, device=q.device)[:, None] if mix.length is None else mix.length
        share = (mix.average.float()[:, None, None] - alpha) / seen
        weights = alpha * chances + share * mask
    if mix.gate is not None:
        weights = weights * mix.gate.float().sigmoid().transpose(1, 2)[..., None]
    return chances, weights


@torch.no_grad()
def look(model: Transformer, rows: Tensor) -> dict[str, Any]:
    """Numbers by layer and head, their means, and one picture a layer: of the head that reads the first token most.

    ``rows`` [N, T] token ids, each the beginning of a document. N must be at least 1.
    """
    looked = Looked()
    positions = torch.arange(rows.shape[1])
    for part in rows.split(BATCH):
        model(part, positions.expand_as(part), Looking(looked))
    by_head = {
        name: [_mean(getattr(looked, name)[layer]).tolist() for layer in sorted(looked.first)]
        for name in ("first", "read", "mass", "entropy")
    }
    pictures = []
    for layer, found in sorted(looked.pictures.items()):
        head = int(_mean(looked.read[layer]).argmax())
        pictures.append([[round(x, 3) for x in row] for row in _mean(found)[head].tolist()])
    means = {name: statistics.mean(x for layer in found for x in layer) for name, found in by_head.items()}
    return {
        "heads": {n: _rounded(found) for n, found in by_head.items()},
        "means": means,
        "pictures": pictures,
    }


def _mean(batches: Sequence[Tensor]) -> Tensor:
    """Over all rows of all batches."""
    return torch.cat(list(batches)).mean(0)


def _rounded(found: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(x, 4) for x in layer] for layer in found]
