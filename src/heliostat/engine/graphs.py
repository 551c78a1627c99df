"""Decode passes that are recorded once for each shape and replayed: inputs at fixed places, outputs, too.

What records is given: on a GPU a CUDA graph, so that a pass costs one launch; elsewhere ``as_it_is``, which remembers
the function, so that all but the recording itself is the same everywhere.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from heliostat.engine.batch import Pass
from heliostat.engine.fixed import Layout, fill, layout_of
from heliostat.engine.paged import Paged, PagePool
from heliostat.model.transformer import Transformer
from heliostat.ops.decoding import RowPages, row_attention
from heliostat.ops.running import Running

Run = Callable[[], Tensor]
Record = Callable[[Run], Run]
"""Makes of a function without arguments one that does the same on the same tensors, and returns the same tensor."""

MOST_LAYOUTS = 64
WORTH = 2
"""A shape is recorded when it comes for the second time: recording costs as much as many passes."""


class Graphs:
    """The recorded passes of one runner."""

    def __init__(self, pool: PagePool, *, scratch: int, record: Record, worth: int = WORTH) -> None:
        """``scratch``: a page of the pool that no request is ever given."""
        self._pool, self._scratch, self._record, self.worth = pool, scratch, record, worth
        self._size = pool.keys.shape[2]
        self._recorded: OrderedDict[Layout, _Recorded] = OrderedDict()  # the one used last at the end
        self._seen: Counter[Layout] = Counter()
        self.replays = 0
        """Passes that were not run row by row."""
        self.failure = ""
        """Why nothing is recorded any more."""

    def __len__(self) -> int:
        return len(self._recorded)

    def forget(self) -> None:
        """Let everything go that was recorded: weights or adapters have changed."""
        self._recorded.clear()
        self._seen.clear()

    def run(self, model: Transformer, each: Pass) -> Tensor | None:
        """Hidden states [T, E] of a pass, the caller's own; None where it must run as it is."""
        layout = layout_of(each, page_size=self._size)
        if layout is None or self.failure or not self._is_worth(layout):
            return None
        filled = fill(each, layout, page_size=self._size, scratch=self._scratch)
        found = self._recorded.get(layout) or _Recorded(model, self._pool, layout, self._scratch)
        # Not pinned memory: the next pass may fill it before this one was read.
        found.inputs.copy_(torch.tensor(filled.flat), non_blocking=True)
        if found.replay is None and not self._begin(layout, found):
            return None
        assert found.replay is not None
        self._recorded.move_to_end(layout)
        self.replays += 1
        hidden = found.replay()
        # A copy: what is replayed next writes to the same place.
        return hidden[torch.tensor(filled.places, device=hidden.device)]

    def _is_worth(self, layout: Layout) -> bool:
        if layout in self._recorded:
            return True
        if len(self._seen) > 16 * MOST_LAYOUTS:
            self._seen.clear()
        self._seen[layout] += 1
        return self._seen[layout] >= self.worth

    def _begin(self, layout: Layout, found: _Recorded) -> bool:
        try:
            found.replay = self._record(found.run)
        except RuntimeError as error:  # no memory left for it, or something that cannot be recorded
            self.failure = str(error).partition("\n")[0]
            self.forget()
            warnings.warn(f"decoding goes on without graphs: {self.failure}", stacklevel=2)
            return False
        self._recorded[layout] = found
        while len(self._recorded) > MOST_LAYOUTS:
            self._recorded.popitem(last=False)
        return True


class _Recorded:
    """One layout: where its inputs lie, and what runs on them."""

    def __init__(self, model: Transformer, pool: PagePool, layout: Layout, scratch: int) -> None:
        rows, device = layout.rows, pool.keys.device
        self.inputs = torch.zeros(rows * (4 + layout.pages), dtype=torch.long, device=device)
        tokens, positions, slots, visible, pages = self.inputs.split([rows] * 4 + [rows * layout.pages])
        own = RowPages(pages.view(rows, layout.pages), visible)
        writes, ask = torch.arange(rows, device=device), partial(row_attention, rows=own)
        running = partial(Running.of_rows, own, slots, page_size=pool.keys.shape[2], scratch=scratch)

        def run() -> (
            Tensor
        ):  # a seam for every run: where sums come from is computed of the inputs, and recorded
            seam = Paged(pool, writes=writes, slots=slots, ask=ask, running=running)
            return model(tokens, positions, seam, layout.route)

        self.run: Run = run
        self.replay: Run | None = None


def as_it_is(run: Run) -> Run:
    """Records nothing: the function itself."""
    return run


class CudaRecorder:
    """Records CUDA graphs; all share one pool of memory, since none outlives the next."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """A graph of ``run``. It is run twice before: kernels are compiled, and libraries make their workspaces."""
        here = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
