"""Adapters on all blocks of a model as the compiled blocks read them; gathered once, and again after a change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from heliostat.linear.columns import Columns
from heliostat.linear.lora import AdaptedLinear, Part, Route
from heliostat.ops.native.blocks import Added, Dress, Worn


class Wardrobe:
    """The adapters of one model. Whoever puts one on or takes one off has it ``forget``."""

    def __init__(self) -> None:
        self._dresses: dict[str, Dress] = {}
        self._columns: list[Columns] | None = None
        """All there are on the model; None: not looked for yet."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Wardrobe:
        return memo.setdefault(id(self), Wardrobe())  # the addresses are those of another model's tensors

    def forget(self) -> None:
        """Adapters have come or gone."""
        self._dresses.clear()
        self._columns = None

    def __call__(
        self,
        route: Route | None,
        linears: Callable[[], Sequence[nn.Module]],
        dtype: torch.dtype,
        *,
        rows: int,
    ) -> Worn | None:
        """Which of ``rows`` rows wear what; None where the compiled blocks cannot do it.

        ``linears`` lists those of all blocks, in the kernel's order.
        """
        if any(adapter is not None for adapter, _, _ in route or ()) and self._resident(linears):
            return None
        found = []
        for adapter, start, stop in route or ():
            if adapter is None:
                continue
            dress = self._dress(adapter, linears, dtype)
            if dress is None:
                return None
            found.append((dress, start, rows if stop is None else stop))
        return found

    def _dress(
        self, adapter: str, linears: Callable[[], Sequence[nn.Module]], dtype: torch.dtype
    ) -> Dress | None:
        dress = self._dresses.get(adapter)
        if dress is not None and dress.fresh:
            return dress
        worn = [part.part(adapter) if isinstance(part, AdaptedLinear) else None for part in linears()]
        parts = [None if part is None else added(part) for part in worn]
        if any(part is not None and not part.fits(dtype) for part in parts):
            return None
        dress = self._dresses[adapter] = Dress(parts)
        return dress

    def _resident(self, linears: Callable[[], Sequence[nn.Module]]) -> bool:
        """Whether columns stand in a weight: they are there for all rows, and the loop knows what to refuse."""
        if self._columns is None:
            adapted = (linear for linear in linears() if isinstance(linear, AdaptedLinear))
            parts = (part for linear in adapted for part in linear.adapters.values())
            self._columns = [part for part in parts if isinstance(part, Columns)]
        return any(part.resident for part in self._columns)


def added(part: Part) -> Added:
    """An adapter's part on one Linear by its tensors: themselves, so that it is seen where their memory changes."""
    if isinstance(part, Columns):
        return Added(None, part.columns, part.delta)
    return Added(part.a, None, part.b, part.scale)
