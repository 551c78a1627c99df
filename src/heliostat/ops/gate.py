"""The gate of an MLP, and its plain twin."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from heliostat.ops import native


def gated(x: Tensor) -> Tensor:
    """silu(gate) * up for x [..., 2F] with the gate first -> [..., F]."""
    if x.dim() == 2 and x.is_contiguous() and native.ready(x):
        return native.gated(x)
    return plain_gated(x)


def plain_gated(x: Tensor) -> Tensor:
    """The twin of ``gated``."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up
