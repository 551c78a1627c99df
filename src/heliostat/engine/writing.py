"""Pages that a step fills, and which requests wait for them instead of writing twins. No torch."""

from __future__ import annotations

from heliostat.engine.page_table import PageTable
from heliostat.engine.request import Request


class Writing:
    """Pages that a step completes, by key: who needs one next waits for it instead of computing a twin.

    One waits only for a request that arrived earlier, so the earliest never waits for anybody.
    """

    def __init__(self, table: PageTable) -> None:
        self._table = table
        self._arrivals: dict[bytes, int] = {}

    def note(self, request: Request, stop: int) -> None:
        """A request gets to ``stop`` in this step."""
        for index in completed(request.computed, stop, self._table.page_size):
            if (key := self._table.key_of(request, index)) is not None:
                self._arrivals[key] = min(request.arrival, self._arrivals.get(key, request.arrival))

    def by_earlier(self, request: Request, index: int) -> bool:
        """Whether the request's page ``index``, where it goes on, is being written for an earlier arrival."""
        size = self._table.page_size
        if request.computed < len(request.pages) * size or index >= request.cacheable // size:
            return False  # it goes on inside a page of its own, or must run that page for its logits
        key = self._table.key_of(request, index)
        return key is not None and self._arrivals.get(key, request.arrival) < request.arrival


def completed(start: int, stop: int, page_size: int) -> range:
    """Pages that positions [start, stop) fill to the end."""
    return range(start // page_size, stop // page_size)
