"""Grouped-query attention: over whole sequences, and over pages; each with a plain twin that tests hold it to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class PagedGroup:
    """Requests of one pass whose queries have the same count, so that they run as one batch.

    G requests, R query rows each, N pages each (padded), S slots a page.
    """

    rows: Tensor  # [G, R] rows of the pass that ask
    pages: Tensor  # [G, N] page numbers; padding repeats any valid page
    visible: Tensor  # [G, R] how many positions, from the first, each query sees; at least 1
    written: int = 0  # so many positions some query of each request sees; fewer is right too, but slower


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, groups: Sequence[PagedGroup]) -> Tensor:
    """q [T, H, D] over pages [P, S, K, D] -> [T, H, D]; every row of q is in exactly one group.

    Pages are gathered once per request, whatever the number of its rows. What lies beyond the positions that a
    request sees may be anything: pages come back with what was in them, NaN too, which no mask would keep out.
    """
    out = torch.empty_like(q)
    for group in groups:
        count, pages = group.pages.shape[0], group.pages.flatten()
        k = keys.index_select(0, pages).view(count, -1, *keys.shape[2:])  # [G, N*S, K, D]
        v = values.index_select(0, pages).view(count, -1, *values.shape[2:])
        places = torch.arange(k.shape[1], device=q.device)
        beyond = (places[group.written :] >= group.visible.amax(1, keepdim=True))[..., None, None]
        k[:, group.written :].masked_fill_(beyond, 0)  # copies: the pages stay as they are
        v[:, group.written :].masked_fill_(beyond, 0)
        mask = places < group.visible[..., None]  # [G, R, N*S]
        out[group.rows] = attention(q[group.rows], k, v, mask[:, None])
    return out


def plain_paged_attention(q: Tensor, keys: Tensor, values: Tensor, groups: Sequence[PagedGroup]) -> Tensor:
    """The twin of ``paged_attention``: one row at a time."""
    out = torch.empty_like(q)
    for group in groups:
        for rows, pages, visible in zip(group.rows, group.pages, group.visible, strict=True):
            k, v = keys[pages].flatten(0, 1)[None], values[pages].flatten(0, 1)[None]
            for row, count in zip(rows.tolist(), visible.tolist(), strict=True):
                out[row] = plain_attention(q[row][None, None], k[:, :count], v[:, :count])[0, 0]
    return out
