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
from heliostat.engine.fixed import QUERIES
from heliostat.engine.graphs import CudaRecorder, Graphs, Record
from heliostat.engine.paged import Ask, Paged, PagePool
from heliostat.engine.request import Request
from heliostat.model.transformer import Transformer
from heliostat.ops import native
from heliostat.ops.decoding import RowPages, has_triton, triton_rows
from heliostat.ops.native.blocks import Laid
from heliostat.ops.paging import PagedGroup, grouped_attention
from heliostat.ops.running import Running


class Runner:
    """Modules and the page pool they write to. Knows no request's past and decides nothing."""

    def __init__(
        self,
        modules: Mapping[str, Loaded],
        *,
        pages: int,
        page_size: int,
        share: tuple[str, str] | None = None,
        record: Record | None = None,
        pool: PagePool | None = None,
    ) -> None:
        """All modules must have the shape of one config; the pool is float32 if any of them is.

        ``share``: as PagePool's. ``record``: how decode passes are recorded; None: as CUDA graphs on a GPU,
        elsewhere not at all. ``pool``: another runner's, which this one reads and writes, too.
        """
        models = {module.weights: module.model for module in modules.values()}
        first = next(iter(models.values()))
        kinds = {model.dtype for model in models.values()}
        dtype = torch.float32 if torch.float32 in kinds else first.dtype
        self.models: dict[str, Transformer] = models
        self.device = first.device
        if record is None and self.device.type == "cuda":
            record = CudaRecorder()
        scratch = int(record is not None)  # one page more, that no request is given
        self.pool = pool or PagePool(
            first.config,
            pages=pages + scratch,
            page_size=page_size,
            dtype=dtype,
            device=str(first.device),
            share=share,
        )
        self.graphs = Graphs(self.pool, scratch=pages, record=record) if record else None
        self.ran = Ran()

    @torch.inference_mode()
    def run(self, passes: Sequence[Pass], states: list[Tensor] | None = None) -> tuple[list[Request], Tensor]:
        """Run the passes in order; returns the requests that get a token, once for each row, and their logits [N, V].

        ``states`` is given the hidden states [n, E] behind them, pass by pass.
        """
        requests: list[Request] = []
        logits: list[Tensor] = []
        for each in passes:
            hidden = self._forward(each)
            self.ran.count(each)
            if each.sampled:
                rows = [row for row, _ in each.sampled]
                if len(rows) < len(hidden):  # else every row speaks, in order
                    hidden = hidden[self._tensor(rows)]
                logits.append(self.models[each.weights].logits(hidden))
                if states is not None:
                    states.append(hidden)
                requests += [request for _, request in each.sampled]
        if len(logits) == 1:
            return requests, logits[0]
        return requests, torch.cat([some.float() for some in logits]) if logits else torch.empty(0, 0)

    def _forward(self, each: Pass) -> Tensor:
        """Hidden states [T, E] of one pass."""
        model = self.models[each.weights]
        if self.graphs is not None and (hidden := self.graphs.run(model, each)) is not None:
            return hidden
        route = [(segment.adapter, segment.start, segment.stop) for segment in each.segments]
        laid = native.attends(self.pool.keys) and model.dtype == self.pool.keys.dtype
        ragged = self._ragged(each.entries) if laid else ()
        lists = (each.tokens, each.positions, each.write_rows, each.write_slots, *ragged)
        ids, positions, writes, slots, *where = self._tensors(lists)
        seam = partial(Paged, self.pool, writes=writes, slots=slots, running=partial(self._running, each))
        if not laid:
            return model(ids, positions, seam(ask=self._ask(each.entries)), route)
        entries = native.Ragged(*where)
        filled = self._filled(each) if self.pool.sums.numel() else None
        together = Laid(self.pool.keys, self.pool.values, writes, slots, entries, self.pool.sums, filled)
        return model(ids, positions, seam(ask=partial(native.attend, entries=entries), laid=together), route)

    def changed(self) -> None:
        """Modules have come or gone."""
        if self.graphs is not None:
            self.graphs.forget()

    def _filled(self, each: Pass) -> Tensor:
        """Pages that the pass fills, each behind the one before it."""
        return self._tensor(
            [pair for before, run in each.filled for pair in zip((before, *run), run, strict=False)]
        )

    def _running(self, each: Pass) -> Running:
        size, entries = self.pool.keys.shape[2], [(e.rows, e.pages, e.visible) for e in each.entries]
        return Running.of_entries(entries, each.filled, page_size=size, device=self.device)

    def _ask(self, entries: Sequence[Entry]) -> Ask:
        few = all(len(entry.rows) <= QUERIES for entry in entries)
        if few and self.device.type == "cuda" and has_triton():
            return partial(triton_rows, rows=self._row_pages(entries))
        return partial(grouped_attention, groups=[self._group(some) for some in by_queries(entries)])

    def _row_pages(self, entries: Sequence[Entry]) -> RowPages:
        size = self.pool.keys.shape[2]
        wide = max(-(-max(entry.visible) // size) for entry in entries)
        rows = {
            row: (entry.pages, seen)
            for entry in entries
            for row, seen in zip(entry.rows, entry.visible, strict=True)
        }
        pages = [
            [*rows[row][0][:wide], *[rows[row][0][0]] * (wide - len(rows[row][0]))] for row in sorted(rows)
        ]
        return RowPages(self._tensor(pages), self._tensor([rows[row][1] for row in sorted(rows)]))

    def _ragged(self, entries: Sequence[Entry]) -> tuple[Sequence[int], ...]:
        """What ``native.Ragged`` is made of."""
        counts = [len(entry.rows) for entry in entries]
        size = self.pool.keys.shape[2]
        pages = [entry.pages[: -(-max(entry.visible) // size)] for entry in entries]
        return (
            list(chain.from_iterable(entry.rows for entry in entries)),
            list(chain.from_iterable(entry.visible for entry in entries)),
            [0, *accumulate(counts)],
            list(chain.from_iterable(pages)),
            [0, *accumulate(map(len, pages))][:-1],
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

    def _tensors(self, lists: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """All in one: making a tensor takes longer than filling it."""
        flat = self._tensor(list(chain.from_iterable(lists)))
        return flat.split([len(some) for some in lists])

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def by_queries(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries with the same number of queries together, so that each group is one attention call."""
    groups: defaultdict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[len(entry.rows)].append(entry)
    return list(groups.values())
