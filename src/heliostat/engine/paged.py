"""Where keys and values live when serving: a pool of pages for every layer, and the paged body of the seam."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from heliostat.engine.store import Form, Store
from heliostat.errors import Refused
from heliostat.model.config import ModelConfig
from heliostat.ops.native.blocks import Laid
from heliostat.ops.paging import write_pages


class PagePool:
    """Keys and values of all layers, [L, P, S, K, D] each. Modules of one family have one shape and share a pool."""

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
        self.store: Store | None = None
        if share is None:
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
            return
        if torch.device(device).type != "cpu":
            raise Refused(
                f"pages on {device} cannot be read by other workers: use one process, or device cpu"
            )
        form = Form(
            pages, 2 * config.layers, page_size * config.kv_heads * config.head_width * dtype.itemsize
        )
        self.store = Store.make(*share, form)
        content = torch.frombuffer(self.store.content, dtype=torch.uint8).view(dtype)
        self.keys, self.values = (half.view(shape) for half in content.chunk(2))

    @staticmethod
    def bytes_per_page(config: ModelConfig, *, page_size: int, dtype: torch.dtype) -> int:
        """Memory of one page over all layers, keys and values, bytes."""
        return page_size * config.kv_values_per_token * dtype.itemsize


class Ask(Protocol):
    """How the rows of a pass attend over pages: it knows who sees what."""

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q [T, H, D] over pages [P, S, K, D] -> [T, H, D]."""


class Paged:
    """The seam of one pass: some rows write their keys and values into slots, all rows ask over pages."""

    def __init__(
        self, pool: PagePool, *, writes: Tensor, slots: Tensor, ask: Ask, laid: Laid | None = None
    ) -> None:
        """``writes`` [W]: rows of the pass that write; ``slots`` [W]: page * S + place for each of them.

        ``laid``: the same for all layers at once, where the compiled kernels serve.
        """
        self.pool, self.writes, self.slots, self.ask, self.laid = pool, writes, slots, ask, laid

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, H, D], k and v [T, K, D] -> [T, H, D]. A row sees what it and the rows before it wrote in this pass."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        if self.writes.numel():
            write_pages(k, v, self.writes, self.slots, keys, values)
        return self.ask(q, keys, values)
