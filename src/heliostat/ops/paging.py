"""Keys and values in pages: writing them, and attention over them, with plain twins that tests hold it to.

Where the compiled kernels serve, requests of a pass are laid end to end (``native.Ragged``); elsewhere those with as
many queries go together (``PagedGroup``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.ops import native
from heliostat.ops.attention import attention, plain_attention


def write_pages(k: Tensor, v: Tensor, rows: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Rows [W] of k and v [T, K, D] into slots [W] (page * S + place) of pages [P, S, K, D]."""
    if native.ready(k) and k.dtype == v.dtype == keys.dtype and k[0].is_contiguous() and v[0].is_contiguous():
        native.write_pages(k, v, rows, slots, keys, values)
    else:
        plain_write_pages(k, v, rows, slots, keys, values)


def plain_write_pages(
    k: Tensor, v: Tensor, rows: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> None:
    """The twin of ``write_pages``."""
    keys.flatten(0, 1).index_copy_(0, slots, k[rows].to(keys.dtype))
    values.flatten(0, 1).index_copy_(0, slots, v[rows].to(values.dtype))


@dataclass(frozen=True, slots=True)
class PagedGroup:
    """Requests of one pass whose queries have the same count, so that they run as one batch.

    G requests, R query rows each, N pages each (padded), S slots a page.
    """

    rows: Tensor  # [G, R] rows of the pass that ask
    pages: Tensor  # [G, N] page numbers; padding repeats any valid page
    visible: Tensor  # [G, R] how many positions, from the first, each query sees; at least 1
    written: int = 0  # so many positions some query of each request sees; fewer is right too, but slower


def grouped_attention(
    q: Tensor, keys: Tensor, values: Tensor, groups: Sequence[PagedGroup], sinks: Tensor | None = None
) -> Tensor:
    """q [T, H, D] over pages [P, S, K, D] -> [T, H, D]; every row of q is in exactly one group. ``sinks`` [H].

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
        out[group.rows] = attention(q[group.rows], k, v, mask[:, None], sinks=sinks)
    return out


def plain_paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, groups: Sequence[PagedGroup], sinks: Tensor | None = None
) -> Tensor:
    """The twin of ``grouped_attention`` and of the compiled kernel: one row at a time."""
    out = torch.empty_like(q)
    for group in groups:
        for rows, pages, visible in zip(group.rows, group.pages, group.visible, strict=True):
            k, v = keys[pages].flatten(0, 1)[None], values[pages].flatten(0, 1)[None]
            for row, count in zip(rows.tolist(), visible.tolist(), strict=True):
                seen = k[:, :count], v[:, :count]
                out[row] = plain_attention(q[row][None, None], *seen, sinks=sinks)[0, 0]
    return out
