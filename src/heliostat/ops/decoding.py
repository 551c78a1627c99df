"""Attention of rows that each go their own way: one query a row over its own pages, with shapes that can stay fixed.

Three bodies that agree: the compiled kernel of a CPU, a Triton kernel on a GPU that has Triton, and torch's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from heliostat.ops import native
from heliostat.ops.paging import PagedGroup, grouped_attention, plain_paged_attention


@dataclass(frozen=True, slots=True)
class RowPages:
    """What each of T rows sees: row t positions [0, visible[t]) of pages[t]."""

    pages: Tensor
    """[T, N] page numbers; beyond what is seen any that there is."""
    visible: Tensor
    """[T], at least 1."""


class Body(Protocol):
    """One way to attend."""

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, rows: RowPages, sinks: Tensor | None = None
    ) -> Tensor:
        """q [T, H, D] over pages [P, S, K, D] -> [T, H, D]; ``sinks`` [H]: logits without a value."""


def row_attention(
    q: Tensor, keys: Tensor, values: Tensor, rows: RowPages, sinks: Tensor | None = None
) -> Tensor:
    """q [T, H, D] over pages [P, S, K, D] -> [T, H, D], by the fastest body that there is; ``sinks`` [H]."""
    return body_for(q, keys)(q, keys, values, rows, sinks)


def body_for(q: Tensor, keys: Tensor) -> Body:
    """The fastest body for such queries and pages."""
    if native.attends(keys) and q.dtype == keys.dtype:
        return native_rows
    return triton_rows if keys.device.type == "cuda" and has_triton() else torch_rows


def has_triton() -> bool:
    """Whether Triton is installed: pip install 'heliostat[gpu]'."""
    return find_spec("triton") is not None


def native_rows(
    q: Tensor, keys: Tensor, values: Tensor, rows: RowPages, sinks: Tensor | None = None
) -> Tensor:
    """By the compiled kernel of a CPU."""
    count, wide = rows.pages.shape
    starts = torch.arange(count + 1)
    entries = native.Ragged(
        rows=starts[:-1],
        visible=rows.visible,
        starts=starts,
        pages=rows.pages.flatten(),
        page_starts=starts[:-1] * wide,
    )
    return native.attend(q, keys, values, entries=entries, sinks=sinks)


def triton_rows(
    q: Tensor, keys: Tensor, values: Tensor, rows: RowPages, sinks: Tensor | None = None
) -> Tensor:
    """By the Triton kernel."""
    from heliostat.ops.triton_attention import attend

    return attend(q, keys, values, rows.pages, rows.visible, sinks)


def torch_rows(
    q: Tensor, keys: Tensor, values: Tensor, rows: RowPages, sinks: Tensor | None = None
) -> Tensor:
    """By torch, over pages that are gathered first."""
    return grouped_attention(q, keys, values, [_group(rows)], sinks)


def plain_rows(
    q: Tensor, keys: Tensor, values: Tensor, rows: RowPages, sinks: Tensor | None = None
) -> Tensor:
    """The twin of all: one row at a time."""
    return plain_paged_attention(q, keys, values, [_group(rows)], sinks)


def _group(rows: RowPages) -> PagedGroup:
    each = torch.arange(rows.pages.shape[0], device=rows.pages.device)
    return PagedGroup(each[:, None], rows.pages, rows.visible[:, None])
