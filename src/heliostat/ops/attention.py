"""Grouped-query attention over whole sequences, and its plain twin; over pages: ``heliostat.ops.paging``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad, scaled_dot_product_attention

ALIGNED = 8
"""Numbers that a head grows by for its sink: kernels want widths that are multiples of it."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [B, T, H, D], k and v [B, S, K, D] -> [B, T, H, D]; ``mask`` bool, True = visible, broadcast to [B, H, T, S].

    ``sinks`` [H]: for each head the logit of one key more, that everybody sees and whose value is zero.
    """
    dtype = q.dtype
    if q.device.type == "cpu":
        # torch's fused kernel on a CPU (2.13, avx512_bf16) is slower in bfloat16 than in float32: a little in long
        # forwards, 3-5 times in backwards and in decode steps of few queries. Copying to float32 costs less.
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            if sinks is None or torch.compiler.is_compiling():
                return _with_sinks(q, k, v, mask, causal, sinks).to(dtype)
            return _with_summed_sinks(q, k, v, mask, causal, sinks).to(dtype)
    return _with_sinks(q, k.to(dtype), v.to(dtype), mask, causal, sinks)


def _with_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, sinks: Tensor | None
) -> Tensor:
    scale = q.shape[-1] ** -0.5
    if sinks is None:
        return _fused(q, k, v, mask, causal, scale)
    # One number more in every head: queries carry their sink's logit there, and only the first key asks for it.
    width = q.shape[-1]
    logits = (sinks.float() / scale).to(q.dtype)[:, None].expand(*q.shape[:3], 1)
    q = torch.cat([q, logits, logits.new_zeros(*q.shape[:3], ALIGNED - 1)], -1)
    k, v = (pad(each, (0, ALIGNED, 0, 0, 1, 0)) for each in (k, v))
    k[:, 0, :, width] = 1
    if mask is not None:
        mask = pad(mask, (1, 0), value=True)
    if causal:  # a query more as well, so that each sees the first key and those up to its own
        q = pad(q, (0, 0, 0, 0, 1, 0))
    out = _fused(q, k, v, mask, causal, scale)
    return out[:, int(causal) :, :, :width]


def _with_summed_sinks(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, sinks: Tensor
) -> Tensor:
    """The same by the sum that the CPU's fused kernel hands out beside what it says: nothing is padded."""
    if mask is not None:
        shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf).expand(shape)
    heads = (each.transpose(1, 2) for each in (q, k, v))
    return _Sunk.apply(*heads, mask, causal, sinks.float()).transpose(1, 2)


class _Sunk(torch.autograd.Function):
    """q [B, H, T, D], k and v [B, K, S, D] float32, ``mask`` [B, H, T, S] to be added.

    A key without a value only makes the softmax's sum larger: what was said shrinks by as much, and the kernel's own
    backward pass, given the larger sum and the smaller output, finds the gradients of all others.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, sinks: Tensor
    ) -> Tensor:
        options = {"attn_mask": mask, "scale": q.shape[-1] ** -0.5}
        said, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, **options
        )
        larger = torch.logaddexp(logs, sinks[:, None])
        said = said * (logs - larger).exp()[..., None]
        ctx.causal = causal
        ctx.save_for_backward(q, k, v, mask, sinks, said, larger)
        return said

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, sinks, said, larger = ctx.saved_tensors
        options = {"attn_mask": mask, "scale": q.shape[-1] ** -0.5}
        slopes = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            slope, q, k, v, said, larger, 0.0, ctx.causal, **options
        )
        share = (sinks[:, None] - larger).exp()
        to_sinks = -(share * (slope * said).sum(-1)).sum((0, 2))
        return *slopes, None, None, to_sinks


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """The twin of ``attention``, written out, in float32."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, dim=2).float(), v.repeat_interleave(groups, dim=2).float()
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k) / q.shape[-1] ** 0.5
    if causal:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        more = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, more], -1)
    chances = scores.softmax(-1)[..., : k.shape[1]]
    return torch.einsum("bhts,bshd->bthd", chances, v).to(q.dtype)
