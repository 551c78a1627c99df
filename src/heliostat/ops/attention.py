"""Grouped-query attention over whole sequences, and its plain twin; over pages: ``heliostat.ops.paging``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False) -> Tensor:
    """q [B, T, H, D], k and v [B, S, K, D] -> [B, T, H, D]; ``mask`` bool, True = visible, broadcast to [B, H, T, S]."""
    dtype = q.dtype
    if q.device.type == "cpu":
        # torch's fused kernel on a CPU (2.13, avx512_bf16) is slower in bfloat16 than in float32: a little in long
        # forwards, 3-5 times in backwards and in decode steps of few queries. Copying to float32 costs less.
        with torch.autocast("cpu", enabled=False):
            return _fused(q.float(), k.float(), v.float(), mask, causal).to(dtype)
    return _fused(q, k.to(dtype), v.to(dtype), mask, causal)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """The twin of ``attention``, written out, in float32."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2).float(), v.repeat_interleave(groups, dim=2).float()
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k) / q.shape[-1] ** 0.5
    if causal:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).to(q.dtype)
