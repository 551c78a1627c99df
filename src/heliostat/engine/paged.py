"""Where keys and values live when serving: a pool of pages for every layer, and the paged body of the seam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from heliostat.engine.store import Form, Store
from heliostat.errors import Refused
from heliostat.model.config import ModelConfig
from heliostat.ops.mixing import NOTHING, Mix
from heliostat.ops.native.blocks import Laid
from heliostat.ops.paging import write_pages
from heliostat.ops.running import Running

SUM = torch.float32
"""The number format of running sums, whatever that of the pages."""


class PagePool:
    """Keys and values of all layers, [L, P, S, K, D] each. Modules of one family have one shape and share a pool.

    Where attention is affine there are the running sums of the values, too, up to each full page's end: ``sums``
    [L, P, K, D] float32, a page's side by side.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: str = "cpu",
        share: tuple[str, str] | None = None,
    ) -> None:
        """``share``: name and incarnation of the memory in which pages lie for other workers to read; CPU only."""
        shape = (config.layers, pages, page_size, config.kv_heads, config.head_width)
        own = (pages, config.layers, config.kv_heads, config.head_width) if config.sums_per_page else (0,) * 4
        self.store: Store | None = None
        if share is None:
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
            self.sums = torch.zeros(own, device=device).transpose(0, 1)
            return
        if torch.device(device).type != "cpu":
            raise Refused(
                f"pages on {device} cannot be read by other workers: use one process, or device cpu"
            )
        slices, size = 2 * config.layers, page_size * config.kv_heads * config.head_width * dtype.itemsize
        form = Form(pages, slices, size, config.sums_per_page * SUM.itemsize)
        self.store = Store.make(*share, form)
        content = torch.frombuffer(self.store.content, dtype=torch.uint8)
        written, sums = content.split([pages * slices * size, pages * form.tail_bytes])
        self.keys, self.values = (half.view(shape) for half in written.view(dtype).chunk(2))
        self.sums = sums.view(SUM).view(own).transpose(0, 1)

    @staticmethod
    def bytes_per_page(config: ModelConfig, *, page_size: int, dtype: torch.dtype) -> int:
        """Memory of one page over all layers, keys, values and their sums, bytes."""
        return page_size * config.kv_values_per_token * dtype.itemsize + config.sums_per_page * SUM.itemsize


class Ask(Protocol):
    """How the rows of a pass attend over pages: it knows who sees what."""

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor, *, sinks: Tensor | None = None) -> Tensor:
        """q [T, H, D] over pages [P, S, K, D] -> [T, H, D]; ``sinks`` [H]: logits without a value."""


class Paged:
    """The seam of one pass: some rows write their keys and values into slots, all rows ask over pages."""

    def __init__(
        self,
        pool: PagePool,
        *,
        writes: Tensor,
        slots: Tensor,
        ask: Ask,
        laid: Laid | None = None,
        running: Callable[[], Running] | None = None,
    ) -> None:
        """``writes`` [W]: rows of the pass that write; ``slots`` [W]: page * S + place for each of them.

        ``laid``: the same for all layers at once, where the compiled kernels serve. ``running``: makes what finds the
        running sums, where attention needs them.
        """
        self.pool, self.writes, self.slots, self.ask, self.laid = pool, writes, slots, ask, laid
        self._make_running = running
        self._running: Running | None = None

    @property
    def running(self) -> Running:
        """Made when it is asked for: passes whose layers go at once need none."""
        if self._running is None:
            assert self._make_running is not None, "nobody said where running sums lie"
            self._running = self._make_running()
        return self._running

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mix: Mix = NOTHING) -> Tensor:
        """q [T, H, D], k and v [T, K, D] -> [T, H, D]. A row sees what it and the rows before it wrote in this pass."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        if self.writes.numel():
            write_pages(k, v, self.writes, self.slots, keys, values)
        said = self.ask(q, keys, values, sinks=mix.sinks)
        if mix.alpha is None:
            return mix.finish(said)
        sums = self.pool.sums[layer]
        self.running.fill(values, sums)
        return mix.finish(said, self.running(values, sums), self.running.seen)
