"""Multiplying by a weight: the compiled kernel where it serves, torch's otherwise."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from heliostat.ops import native


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I] by weight [O, I] -> [..., O], plus bias [O]."""
    if _fits(x, weight) and native.ready(x):
        return native.linear(x, weight, bias)
    return functional.linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor) -> bool:
    rows = x.dim() == 2 and x.shape[0] > 0 and x.dtype == weight.dtype
    return rows and x.stride(1) == 1 and weight.is_contiguous()
