"""Mixing with a tape by compiled kernels: one operation there and one back, where torch would run thirty small ones.

Its twins are ``Prefix`` and ``Mix.finish``; where no kernels are built, they are what runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from heliostat.ops import native
from heliostat.ops.mixing import Mix


def serves(said: Tensor, v: Tensor, mix: Mix) -> bool:
    """Whether the kernels can finish ``said`` [B, T, H, D] with the prefix sums of v [B, T, K, D]."""
    if mix.alpha is None or mix.average is None or torch.compiler.is_compiling() or not native.taped(said):
        return False
    floats = mix.alpha.dtype is mix.average.dtype is torch.float32
    return floats and said.dtype in (v.dtype, torch.float32) and not mix.average.requires_grad


def finish(said: Tensor, v: Tensor, mix: Mix, documents: Tensor | None) -> Tensor:
    """As ``mix.finish(said, Prefix(T, documents)(v), ...)``; documents [B, T] int64, side by side; None: one a row."""
    assert mix.alpha is not None and mix.average is not None
    alpha = mix.alpha.expand(*said.shape[:3])
    gate = None if mix.gate is None else mix.gate.float().expand(*said.shape[:3]).contiguous()
    if documents is not None:
        documents = documents.expand(*said.shape[:2]).long().contiguous()
    return _Finished.apply(
        said, v.to(said.dtype), alpha, gate, mix.average.contiguous(), documents, mix.length
    )


class _Finished(torch.autograd.Function):
    """Kept for the backward pass: what attention said, the values, alpha and gates."""

    @staticmethod
    def forward(
        ctx: Any,
        said: Tensor,
        v: Tensor,
        alpha: Tensor,
        gate: Tensor | None,
        average: Tensor,
        documents: Tensor | None,
        length: int | None,
    ) -> Tensor:
        said, v = said.contiguous(), v.contiguous()
        if alpha.stride(2) != 1 or (alpha.stride(0) != alpha.shape[1] * alpha.stride(1)):
            alpha = alpha.contiguous()
        ctx.length = length
        ctx.save_for_backward(said, v, alpha, gate, average.clone(), documents)
        rows = native.mixing_rows(said.shape, v.shape[2], alpha, average, gate, documents, length)
        return native.mix(rows, said, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        said, v, alpha, gate, average, documents = ctx.saved_tensors
        rows = native.mixing_rows(said.shape, v.shape[2], alpha, average, gate, documents, ctx.length)
        slope = slope.to(said.dtype).contiguous()
        slopes = native.mix_slopes(rows, said, v, slope, gated=gate is not None)
        return *slopes, None, None, None
