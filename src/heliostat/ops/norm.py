"""Root-mean-square norm, and its plain twin."""

from __future__ import annotations

import torch
from torch import Tensor

from heliostat.ops import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., E] over its root mean square, times weight [E]; computed in float32, given in x's dtype."""
    if native.ready(x) and x.is_contiguous() and x.dtype == weight.dtype:
        return native.rms_norm(x, weight, eps)
    return plain_rms_norm(x, weight, eps)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The twin of ``rms_norm``."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight.to(x.dtype) * wide.to(x.dtype)
