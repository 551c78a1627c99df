"""A worker around an engine in this process: the protocol's calls on the event loop, the engine wherever its drive is.

Nothing is copied or packed on the way: what the core says is handed to who listens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from heliostat.engine.grammar import Grammars
from heliostat.engine.request import Matcher
from heliostat.errors import Refused
from heliostat.serve.protocol import Described, Failed, Handed, Handle, Hear, Order, Said, Stats, no
from heliostat.serve.shelf import Shelf
from heliostat.serve.worker_core import Core, Event
from heliostat.serve.worker_drive import Drive, Threaded

T = TypeVar("T")
DRAIN_LOOK = 0.02
"""Seconds between two looks whether all is done."""


class EngineWorker:
    """Implements ``protocol.Worker``; works from ``start`` to ``close``."""

    def __init__(self, core: Core, *, drive: Drive | None = None, shelf: Shelf | None = None) -> None:
        """``drive``: a thread of its own where none is given; ``shelf``: where modules come from, if any may come."""
        self.core, self.shelf = core, shelf
        self._drive: Drive = drive or Threaded()
        self._hears: dict[str, Hear] = {}
        self._prefills: dict[str, asyncio.Future[Handed | Failed]] = {}
        self._grammars: Grammars | None = None
        self._loading = asyncio.Lock()
        self._calls: set[asyncio.Future[Any]] = set()
        self._closed = False

    def start(self) -> None:
        """Begin to work, for the loop that is running."""
        self._drive.start(self.core, self._deliver)

    @property
    def failure(self) -> str:
        """Why nothing can be answered any more; empty while all is well."""
        return self.core.failure

    # ---- orders

    async def prefill(self, order: Order) -> Handed | Failed:
        """Run the positions below the boundary."""
        matcher = await self._matcher(order)
        if isinstance(matcher, Failed):
            return matcher
        done: asyncio.Future[Handed | Failed] = asyncio.get_running_loop().create_future()
        self._prefills[order.id] = done
        try:
            failed = await self._taken(order, partial(self.core.prefill, order, matcher=matcher))
            return failed or await done
        except asyncio.CancelledError:
            self.abort(order.id)
            raise

    async def decode(self, order: Order, hear: Hear, handle: Handle | None = None) -> Failed | None:
        """Take a request in, and run it to its end."""
        matcher = await self._matcher(order)
        if isinstance(matcher, Failed):
            return matcher
        self._hears[order.id] = hear
        try:
            return await self._taken(order, partial(self.core.decode, order, handle=handle, matcher=matcher))
        except asyncio.CancelledError:
            self.abort(order.id)
            raise

    async def _taken(self, order: Order, take: Callable[..., Failed | None]) -> Failed | None:
        """What the core says to an order; None: it is taken in."""
        loop = asyncio.get_running_loop()
        try:
            failed = await self._call(lambda: take(now=loop.time()))
        except ConnectionError as error:
            failed = no(order.id, "worker_lost", str(error))
        if failed is not None:
            self._drop(order.id)
        return failed

    async def _matcher(self, order: Order) -> Matcher | Failed | None:
        if order.schema is None:
            return None
        try:
            return await asyncio.to_thread(self._hold, order.schema)
        except (Refused, ValueError) as error:
            return no(order.id, "schema", str(error))

    def _hold(self, schema: str) -> Matcher:
        if self._grammars is None:
            self._grammars = Grammars(self.core.engine.tokenizer)
        return self._grammars.matcher(json.loads(schema))

    def abort(self, order: str) -> None:
        """End an order wherever it stands."""
        self._drop(order)
        if not self._closed:
            self._drive.put(partial(self.core.abort, order))

    def release(self, handle: Handle) -> None:
        """Lent pages are needed no more."""
        if not self._closed:
            self._drive.put(partial(self.core.release, handle))

    def _drop(self, order: str) -> None:
        """Nobody listens to this any more."""
        self._hears.pop(order, None)
        done = self._prefills.pop(order, None)
        if done is not None and not done.done():
            done.set_result(no(order, "aborted", "it was aborted"))

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            try:
                self._tell(event)
            except Exception as error:  # one listener's, which the others must not miss their words for
                loop = asyncio.get_running_loop()
                loop.call_exception_handler({"message": "a listener failed", "exception": error})

    def _tell(self, event: Event) -> None:
        last = not isinstance(event, Said) or event.finish is not None
        hear = self._hears.pop(event.order, None) if last else self._hears.get(event.order)
        if hear is not None and not isinstance(event, Handed):
            hear(event)
        elif not isinstance(event, Said):
            done = self._prefills.pop(event.order, None)
            if done is not None and not done.done():
                done.set_result(event)

    # ---- the worker itself

    async def describe(self) -> Described:
        """What it is now."""
        return await self._call(self.core.describe)

    async def stats(self) -> Stats:
        """What it is doing."""
        return await self._call(self.core.stats)

    async def load(self, modules: Mapping[str, str]) -> Described:
        """Host more modules of the family."""
        shelf = self._shelf()
        async with self._loading:
            arrival = await asyncio.to_thread(shelf.read_modules, modules)

            def enter() -> Described:
                new = shelf.put(arrival)
                try:
                    self.core.engine.load(new)
                except Refused:
                    shelf.forget(new)
                    raise
                return self.core.describe()

            return await self._call(enter)

    async def unload(self, modules: Sequence[str]) -> Described:
        """Let modules go."""

        def leave() -> Described:
            self.core.engine.unload(modules)
            if self.shelf is not None:
                self.shelf.forget(modules)
            return self.core.describe()

        async with self._loading:
            return await self._call(leave)

    def _shelf(self) -> Shelf:
        if self.shelf is None:
            raise Refused("this worker was not started from a folder: there is nothing to load modules from")
        return self.shelf

    async def drain(self) -> None:
        """Take nothing more in, and wait until all is done."""

        def drained() -> bool:
            self.core.draining = True
            return self.core.idle

        while not await self._call(drained):
            await asyncio.sleep(DRAIN_LOOK)

    async def close(self) -> None:
        """End it."""
        if self._closed:
            return
        self._closed = True
        await self._drive.stop()
        for order in [*self._hears, *self._prefills]:
            self._deliver([no(order, "worker_lost", "the worker is closed")])
        for answer in tuple(self._calls):
            _settle(answer, None, ConnectionError("the worker is closed"))
        if self.core.engine.store is not None:
            self.core.engine.store.close(remove=True)

    async def _call(self, work: Callable[[], T]) -> T:
        """``work()`` beside the core, between two steps."""
        if self._closed:
            raise ConnectionError("the worker is closed")
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def run() -> None:
            try:
                result = work()
            except Exception as error:  # it is the caller's, whatever it is
                self._drive.tell(_settle, answer, None, error)
            else:
                self._drive.tell(_settle, answer, result, None)

        self._calls.add(answer)
        answer.add_done_callback(self._calls.discard)
        self._drive.put(run)
        return await answer


def _settle(answer: asyncio.Future[T], result: T | None, error: Exception | None) -> None:
    if answer.done():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(result)  # type: ignore[arg-type]
