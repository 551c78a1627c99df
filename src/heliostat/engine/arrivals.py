"""Pages on their way in: a bounded number of bytes between two steps, so that those who decode are not held up.

Everything happens on the engine's own thread. A request that is ended meanwhile is simply not asked about again:
nobody is left who could still write into pages that it gave back. No torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from heliostat.engine.request import Request, State
from heliostat.engine.scheduler import Scheduler
from heliostat.engine.store import Fetch, Gone

STEP_BYTES = 8 * 2**20
"""Most bytes that are brought in between two steps; a single page may be larger."""


@dataclass(slots=True)
class Arrivals:
    """Fills the pages of requests that fetch, in the order of their arrival."""

    scheduler: Scheduler
    step_bytes: int = STEP_BYTES
    clock: Callable[[], float] = time.perf_counter
    bytes: int = 0
    """Brought in so far, in so many ``seconds``."""
    seconds: float = 0.0
    _fetches: dict[str, Fetch] = field(default_factory=dict)

    def expect(self, request: Request, fetch: Fetch) -> None:
        """A request that was added and fetches."""
        self._fetches[request.id] = fetch

    def forget(self, request_id: str) -> None:
        """Needed no more."""
        self._fetches.pop(request_id, None)

    def bring(self) -> list[tuple[Request, str]]:
        """Fill the next pages; returns requests that ended because theirs are gone, and why."""
        room, ended = self.step_bytes, []
        for request in self.scheduler.arriving if self._fetches else ():
            try:
                room = self._fill(request, self._fetches[request.id], room)
            except Gone as gone:
                self.scheduler.finish(request.id, "gone")
                ended.append((request, str(gone)))
            if room <= 0:
                break
        return ended

    def _fill(self, request: Request, fetch: Fetch, room: int) -> int:
        size, before, began = self.scheduler.table.page_size, fetch.bytes, self.clock()
        while request.state is State.RUNNING and request.arriving and room > fetch.bytes - before:
            index = request.computed // size
            fetch.bring(index, request.pages[index])
            self.scheduler.arrived(request, 1)
        moved, taken = fetch.bytes - before, self.clock() - began
        self.bytes, self.seconds, fetch.seconds = (
            self.bytes + moved,
            self.seconds + taken,
            fetch.seconds + taken,
        )
        return room - moved
