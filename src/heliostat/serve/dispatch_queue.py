"""Requests that no worker can take now: first come, first served among those who need the same."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Collection, Hashable
from dataclasses import dataclass

from heliostat.serve.dispatch_asked import Open
from heliostat.serve.router import Nowhere, Route, Router, Wish
from heliostat.serve.trouble import Trouble


@dataclass(slots=True, eq=False)
class _Waiting:
    open: Open
    wish: Wish
    rather_not: Collection[str]
    found: asyncio.Future[Route]
    nobody: float | None
    """Since when no worker is there for it; None: some are, and have their hands full."""

    def told(self, nowhere: Nowhere, now: float) -> None:
        """Still waiting, and why."""
        self.open.waits_for = nowhere.why
        self.nobody = None if nowhere.busy else now if self.nobody is None else self.nobody


class Queue:
    """Finds each request its workers, at once or when there are some."""

    def __init__(self, router: Router, *, patience: float) -> None:
        self._router, self._patience = router, patience
        self._lines: OrderedDict[Hashable, deque[_Waiting]] = OrderedDict()
        self._of: dict[str, _Waiting] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._of)

    def members(self) -> list[str]:
        """Whose requests wait."""
        return [waiting.open.member for waiting in self._of.values()]

    async def place(self, open_: Open, wish: Wish, rather_not: Collection[str]) -> Route:
        """Its workers, which know of it by now. Raises Trouble (503) when the patience is over."""
        loop = asyncio.get_running_loop()
        key = _needs(wish)
        if key not in self._lines:
            route = self._try(wish, rather_not, loop.time())
            if isinstance(route, Route):
                return route
        else:
            head = self._lines[key][0]
            route = Nowhere(head.open.waits_for, busy=head.nobody is None)
        waiting = _Waiting(open_, wish, rather_not, loop.create_future(), None)
        waiting.told(route, loop.time())
        self._lines.setdefault(key, deque()).append(waiting)
        self._of[open_.id] = waiting
        self._wake(loop)
        try:
            return await self._found(waiting)
        except BaseException:
            if waiting.found.done():  # found in this very moment
                self._router.ended(wish.order.id)
            raise
        finally:
            self._leave(key, waiting)

    async def _found(self, waiting: _Waiting) -> Route:
        """Its workers. Who waits where hands are full waits on: patience is for where nobody is."""
        loop = asyncio.get_running_loop()
        while True:
            since = loop.time() if waiting.nobody is None else waiting.nobody
            await asyncio.wait([waiting.found], timeout=since + self._patience - loop.time())
            if waiting.found.done():
                return waiting.found.result()
            self.changed()
            if waiting.nobody is not None and loop.time() >= waiting.nobody + self._patience:
                text = f"{waiting.open.waits_for}; waited {self._patience:g} s"
                raise Trouble(503, text, code="no_worker", headers={"Retry-After": "5"})

    def _try(self, wish: Wish, rather_not: Collection[str], now: float) -> Route | Nowhere:
        route = self._router.route(wish, now, rather_not=rather_not)
        if isinstance(route, Route):
            self._router.send(wish, route)
        return route

    def changed(self) -> None:
        """There may be room now, or somebody new."""
        if not self._lines:
            return
        loop = asyncio.get_running_loop()
        for line in sorted(self._lines.values(), key=lambda line: line[0].open.began):
            nowhere: Nowhere | None = None
            for waiting in line:
                if waiting.found.done():
                    continue
                if nowhere is None:
                    route = self._try(waiting.wish, waiting.rather_not, loop.time())
                    if isinstance(route, Route):
                        waiting.found.set_result(route)
                        waiting.open.waits_for = ""
                        continue
                    nowhere = route
                waiting.told(nowhere, loop.time())
        self._wake(loop)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look again when a worker that was left alone may be tried."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        when = self._router.next_probe()
        if when is not None and self._lines:
            self._timer = loop.call_at(when, self.changed)

    def _leave(self, key: Hashable, waiting: _Waiting) -> None:
        del self._of[waiting.open.id]
        line = self._lines[key]
        line.remove(waiting)
        if not line:
            del self._lines[key]
        self.changed()  # who came after it was not tried before it was gone


def _needs(wish: Wish) -> Hashable:
    return wish.writer if wish.boundary else None, wish.answerers
