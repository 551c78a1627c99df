"""Runs the passes of a step: lists from ``batch`` become tensors here, and logits come back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate, chain

import torch
from torch import Tensor

from heliostat.build import Loaded
from heliostat.engine.batch import Entry, Pass, Ran
from heliostat.engine.paged import Ask, Paged, PagePool
from heliostat.engine.request import Request
from heliostat.model.transformer import Transformer
from heliostat.ops import native
from heliostat.ops.paging import PagedGroup, grouped_attention


class Runner:
    """Modules and the page pool they write to. Knows no request's past and decides nothing."""

    def __init__(
        self,
        modules: Mapping[str, Loaded],
        *,
        pages: int,
        page_size: int,
        share: tuple[str, str] | None = None,
    ) -> None:
        """All modules must have the shape of one config; the pool is float32 if any of them is.

        ``share``: as PagePool's.
        """
        models = {module.weights: module.model for module in modules.values()}
        first = next(iter(models.values()))
        kinds = {model.dtype for model in models.values()}
        dtype = torch.float32 if torch.float32 in kinds else first.dtype
        self.models: dict[str, Transformer] = models
        self.pool = PagePool(
            first.config,
            pages=pages,
            page_size=page_size,
            dtype=dtype,
            device=str(first.device),
            share=share,
        )
        self.device = first.device
        self.ran = Ran()

    @torch.inference_mode()
    def run(self, passes: Sequence[Pass]) -> tuple[list[Request], Tensor]:
        """Run the passes in order; returns the requests that get a token and their logits [N, V] (float32)."""
        requests: list[Request] = []
        logits: list[Tensor] = []
        for each in passes:
            hidden = self._forward(each)
            self.ran.count(each)
            if each.sampled:
                rows = [row for row, _ in each.sampled]
                logits.append(self.models[each.weights].logits(hidden[rows]).float())
                requests += [request for _, request in each.sampled]
        return requests, torch.cat(logits) if logits else torch.empty(0, 0)

    def _forward(self, each: Pass) -> Tensor:
        """Hidden states [T, E] of one pass."""
        model = self.models[each.weights]
        seam = Paged(
            self.pool,
            writes=self._tensor(each.write_rows),
            slots=self._tensor(each.write_slots),
            ask=self._ask(each.entries, model.dtype),
        )
        route = [(segment.adapter, segment.start, segment.stop) for segment in each.segments]
        return model(self._tensor(each.tokens), self._tensor(each.positions), seam, route)

    def _ask(self, entries: Sequence[Entry], dtype: torch.dtype) -> Ask:
        """The fastest attention over pages that there is here for queries of ``dtype``."""
        if native.attends(self.pool.keys) and dtype == self.pool.keys.dtype:
            return partial(native.attend, entries=self._ragged(entries))
        return partial(grouped_attention, groups=[self._group(some) for some in by_queries(entries)])

    def _ragged(self, entries: Sequence[Entry]) -> native.Ragged:
        counts = [len(entry.rows) for entry in entries]
        size = self.pool.keys.shape[2]
        pages = [entry.pages[: -(-max(entry.visible) // size)] for entry in entries]
        return native.Ragged(
            rows=self._tensor(list(chain.from_iterable(entry.rows for entry in entries))),
            visible=self._tensor(list(chain.from_iterable(entry.visible for entry in entries))),
            starts=self._tensor([0, *accumulate(counts)]),
            pages=self._tensor(list(chain.from_iterable(pages))),
            page_starts=self._tensor([0, *accumulate(map(len, pages))][:-1]),
        )

    def _group(self, entries: Sequence[Entry]) -> PagedGroup:
        size = self.pool.keys.shape[2]
        needed = [-(-max(entry.visible) // size) for entry in entries]
        longest = max(needed)
        pages = [
            [*entry.pages[:count], *[entry.pages[0]] * (longest - count)]
            for entry, count in zip(entries, needed, strict=True)
        ]
        rows, visible = [entry.rows for entry in entries], [entry.visible for entry in entries]
        written = min(map(max, visible))
        return PagedGroup(self._tensor(rows), self._tensor(pages), self._tensor(visible), written)

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def by_queries(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries with the same number of queries together, so that each group is one attention call."""
    groups: defaultdict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[len(entry.rows)].append(entry)
    return list(groups.values())
