"""The highest of each row of logits, and its plain twin."""

from __future__ import annotations

import torch
from torch import Tensor

from heliostat.ops import native


@torch.no_grad()
def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row [N, V]: where its highest number stands, the first of equals [N], and whether all are finite [N]."""
    if native.ready(logits) and logits.is_contiguous():
        return native.best(logits)
    return plain_best(logits)


def plain_best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The twin of ``best``; where not all numbers are finite, it may find another place."""
    return logits.argmax(dim=-1), logits.isfinite().all(-1)
