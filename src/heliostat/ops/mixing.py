"""What becomes of attention's output before the last product: scaled, with a share of all values, gated; and prefix sums.

Affine-scaled attention (arXiv 2602.23057) is alpha times softmax attention plus a share of the sum of the values that a
query sees, so every fused kernel of attention serves as it is. Sums are in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 16
"""Positions that are summed together."""


@dataclass(frozen=True, slots=True)
class Mix:
    """How the heads of each row weigh what they read; what is None is not done."""

    alpha: Tensor | None = None
    """[..., H] float32."""
    average: Tensor | None = None
    """[H] float32: the moving average of alpha; there where alpha is."""
    length: int | None = None
    """N where it is fixed; None: the positions that a query sees."""
    gate: Tensor | None = None
    """[..., H], before the sigmoid."""
    sinks: Tensor | None = None
    """[H] logits without a value in the softmax: what attends takes them in itself."""

    def finish(self, said: Tensor, sums: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """``said`` [..., H, D], attention's output, mixed with ``sums`` [..., K, D] over ``seen`` [...] positions.

        Sums are needed where there is an alpha.
        """
        out = said
        if self.alpha is not None:
            assert self.average is not None and sums is not None and seen is not None
            counts = seen[..., None] if self.length is None else self.length
            share = (self.average - self.alpha) / counts  # [..., H]
            each = sums.float().repeat_interleave(said.shape[-2] // sums.shape[-2], dim=-2)
            out = self.alpha[..., None] * said.float() + share[..., None] * each
        if self.gate is not None:
            out = out * self.gate.float().sigmoid()[..., None]
        return out.to(said.dtype)


NOTHING = Mix()
"""Softmax attention as everybody has it."""


class Prefix:
    """Sums over every position's own and all before it in its document, without a sum of one ever touching another."""

    def __init__(
        self, length: int, documents: Tensor | None = None, *, device: torch.device | None = None
    ) -> None:
        """Rows of ``length`` positions; ``documents`` [B, T]: whose each is, side by side; None: one a row."""
        count = -(-length // CHUNK)
        if documents is None:
            documents = torch.zeros(1, length, dtype=torch.long, device=device)
        spare = count * CHUNK - length
        padded = torch.cat([documents, documents[:, -1:].expand(-1, spare)], 1).unflatten(1, (count, CHUNK))
        ends, chunks = padded[:, :, -1], torch.arange(count, device=padded.device)
        earlier = chunks[:, None, None] > chunks  # [n, 1, n]
        inside = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=padded.device).tril()
        self._length = length
        self._inside = ((padded[..., None] == padded[:, :, None]) & inside).float()  # [B, n, C, C]
        self._before = ((padded[..., None] == ends[:, None, None]) & earlier).float()  # [B, n, C, n]
        tails = self._inside[:, :, -1].sum(-1)[:, None, None]  # positions of the document at each chunk's end
        self.seen = (self._inside.sum(-1) + (self._before * tails).sum(-1)).flatten(1)[:, :length]
        """[B, T] float32: positions in each sum."""

    def __call__(self, v: Tensor) -> Tensor:
        """v [B, T, K, D] -> its sums [B, T, K, D] float32."""
        with torch.autocast(v.device.type, enabled=False):
            flat = v.float().flatten(2)
            spare = self._inside.shape[1] * CHUNK - self._length
            chunks = torch.nn.functional.pad(flat, (0, 0, 0, spare)).unflatten(
                1, (-1, CHUNK)
            )  # [B, n, C, KD]
            inside = self._inside @ chunks
            before = self._before.flatten(1, 2) @ inside[:, :, -1]  # [B, nC, KD]
            return (inside.flatten(1, 2) + before)[:, : self._length].unflatten(-1, v.shape[2:])


def masked_sums(mask: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of v [B, S, K, D] over what ``mask`` [B, 1, T, S] shows: [B, T, K, D] float32, and how many, [B, T]."""
    with torch.autocast(v.device.type, enabled=False):
        seen = mask[:, 0].float()
        return (seen @ v.float().flatten(2)).unflatten(-1, v.shape[2:]), seen.sum(-1)
