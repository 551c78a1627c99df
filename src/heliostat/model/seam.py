"""Bodies of the seam for whole sequences [B, T]: causal, packed, recorded, and reading what others wrote.

The paged body, for serving, is the engine's (``heliostat.engine.paged``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from heliostat.ops import mixing_taped
from heliostat.ops.attention import attention
from heliostat.ops.mixing import NOTHING, Mix, Prefix, masked_sums

KeyValues = dict[int, tuple[Tensor, Tensor]]
"""Keys and values by layer, each [B, T, K, D]."""


class Causal:
    """Every position sees itself and what is before it. Right padding needs no mask: nobody sees it."""

    def __init__(self) -> None:
        self._prefix: Prefix | None = None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mix: Mix = NOTHING) -> Tensor:
        """q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D]."""
        said = attention(q, k, v, causal=True, sinks=mix.sinks)
        if mix.alpha is None:
            return mix.finish(said)
        if mixing_taped.serves(said, v, mix):
            return mixing_taped.finish(said, v, mix, None)
        if self._prefix is None:
            self._prefix = Prefix(q.shape[1], device=q.device)
        return mix.finish(said, self._prefix(v), self._prefix.seen)


class Masked:
    """Every position sees what ``mask`` [B, 1, T, T] (bool, True = visible) lets it see."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._documents: Tensor | None = None
        self._prefix: Prefix | None = None

    @classmethod
    def documents(cls, numbers: Tensor) -> Masked:
        """Causal within a document; ``numbers`` [B, T] is each position's document (a packed row holds several).

        Positions of a document stand side by side.
        """
        same = numbers[:, :, None] == numbers[:, None, :]
        made = cls((same & torch.ones_like(same[0]).tril())[:, None])
        made._documents = numbers
        return made

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mix: Mix = NOTHING) -> Tensor:
        """q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D]."""
        said = attention(q, k, v, self.mask, sinks=mix.sinks)
        if mix.alpha is None:
            return mix.finish(said)
        if self._documents is None:
            return mix.finish(said, *masked_sums(self.mask, v))
        if mixing_taped.serves(said, v, mix):
            return mixing_taped.finish(said, v, mix, self._documents)
        if self._prefix is None:
            self._prefix = Prefix(q.shape[1], self._documents)
        return mix.finish(said, self._prefix(v), self._prefix.seen)


class Recording:
    """Attends as ``inner`` does and keeps the keys and values, gradients included, for another module to read."""

    def __init__(self, inner: Causal | Masked | Reading) -> None:
        self.inner = inner
        self.written: KeyValues = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mix: Mix = NOTHING) -> Tensor:
        """As ``inner``. A block recomputed in the backward pass records nothing new: the first record carries the tape."""
        self.written.setdefault(layer, (k, v))
        return self.inner(layer, q, k, v, mix)


class Reading:
    """Queries of one module over keys and values that others wrote, and over its own where ``own``.

    ``sources`` are concatenated along time, own last; ``mask`` [B, 1, T, sum of source lengths (+ T)] says what
    each query sees, and every query must see something.
    """

    def __init__(self, sources: Sequence[KeyValues], mask: Tensor, *, own: bool) -> None:
        self.sources, self.mask, self.own = tuple(sources), mask, own

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mix: Mix = NOTHING) -> Tensor:
        """q [B, T, H, D] -> [B, T, H, D]; k and v [B, T, K, D] are used only where ``own``."""
        keys, values = zip(*(source[layer] for source in self.sources), strict=True)
        if self.own:
            keys, values = (*keys, k), (*values, v)
        read = _joined(values, q)
        said = attention(q, _joined(keys, q), read, self.mask, sinks=mix.sinks)
        if mix.alpha is None:
            return mix.finish(said)
        return mix.finish(said, *masked_sums(self.mask, read))


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    # A frozen writer may run in bfloat16 under a speaker in float32; the speaker's arithmetic decides.
    return parts[0].to(like.dtype) if len(parts) == 1 else torch.cat([p.to(like.dtype) for p in parts], dim=1)
