"""Bodies of the seam for whole sequences [B, T]: causal, packed, recorded, and reading what others wrote.

The paged body, for serving, is the engine's (``heliostat.engine.paged``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heliostat.ops.attention import attention

KeyValues = dict[int, tuple[Tensor, Tensor]]
"""Keys and values by layer, each [B, T, K, D]."""


class Causal:
    """Every position sees itself and what is before it. Right padding needs no mask: nobody sees it."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D]."""
        return attention(q, k, v, causal=True)


class Masked:
    """Every position sees what ``mask`` [B, 1, T, T] (bool, True = visible) lets it see."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    @classmethod
    def documents(cls, numbers: Tensor) -> Masked:
        """Causal within a document; ``numbers`` [B, T] is each position's document (a packed row holds several)."""
        same = numbers[:, :, None] == numbers[:, None, :]
        return cls((same & torch.ones_like(same[0]).tril())[:, None])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D]."""
        return attention(q, k, v, self.mask)


class Recording:
    """Attends as ``inner`` does and keeps the keys and values, gradients included, for another module to read."""

    def __init__(self, inner: Causal | Masked | Reading) -> None:
        self.inner = inner
        self.written: KeyValues = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As ``inner``. A block recomputed in the backward pass records nothing new: the first record carries the tape."""
        self.written.setdefault(layer, (k, v))
        return self.inner(layer, q, k, v)


class Reading:
    """Queries of one module over keys and values that others wrote, and over its own where ``own``.

    ``sources`` are concatenated along time, own last; ``mask`` [B, 1, T, sum of source lengths (+ T)] says what
    each query sees, and every query must see something.
    """

    def __init__(self, sources: Sequence[KeyValues], mask: Tensor, *, own: bool) -> None:
        self.sources, self.mask, self.own = tuple(sources), mask, own

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, H, D] -> [B, T, H, D]; k and v [B, T, K, D] are used only where ``own``."""
        keys, values = zip(*(source[layer] for source in self.sources), strict=True)
        if self.own:
            keys, values = (*keys, k), (*values, v)
        return attention(q, _joined(keys, q), _joined(values, q), self.mask)


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    # A frozen writer may run in bfloat16 under a speaker in float32; the speaker's arithmetic decides.
    return parts[0].to(like.dtype) if len(parts) == 1 else torch.cat([p.to(like.dtype) for p in parts], dim=1)
