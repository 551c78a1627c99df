"""In which order idle pages are lost: by how often they were asked for again, then by age. No torch.

A clock counts turnovers of the pages that nobody asked for twice. A page lives through one turnover, and through
one more for every time that another request found it: so a flood of texts that never return washes past a prefix
that waits for its tool, and a prefix that was popular once is lost in the end as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

MOST_HITS = 8
"""Turnovers that a page can earn: the longest that one which is never asked for again can stay."""


class Idle:
    """Pages that nobody holds, by the turnover in which they go. Each call takes constant time."""

    def __init__(self) -> None:
        self._clock = 0
        self._due: dict[int, int] = {}
        self._by_due: dict[int, OrderedDict[int, None]] = {}  # the first to go first

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, page: int) -> bool:
        return page in self._due

    def __iter__(self) -> Iterator[int]:
        """The order in which they would go."""
        return (page for due in sorted(self._by_due) for page in self._by_due[due])

    def add(self, page: int, *, hits: int, after: int | None = None) -> None:
        """A page that is held no more; ``after``: an idle page that must go before it, whatever the hits say."""
        assert page not in self._due, f"page {page} is idle already"
        due = self._clock + 1 + min(hits, MOST_HITS)
        if after is not None:
            due = max(due, self._due[after])
        self._due[page] = due
        self._by_due.setdefault(due, OrderedDict())[page] = None

    def remove(self, page: int) -> None:
        """A page that is held again, or lost; nothing if it was not idle."""
        due = self._due.pop(page, None)
        if due is not None:
            del self._by_due[due][page]
            if not self._by_due[due]:
                del self._by_due[due]

    def pop(self) -> int:
        """The page to lose now, idle no more; the clock goes on to its turnover."""
        self._clock = min(self._by_due)  # of at most MOST_HITS + 2
        page = next(iter(self._by_due[self._clock]))
        self.remove(page)
        return page
