"""What keeps a worker's core going: a thread of its own, or the event loop itself, for tests on counted time."""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from heliostat.serve.worker_core import Core, Event

Work = Callable[[], None]
Deliver = Callable[[Sequence[Event]], None]

LAST_STEP = 10.0
"""Seconds that the step in progress may take when the worker ends; the thread does not keep the process alive."""
LONGEST_WAIT = 1.0
"""Seconds that an idle thread sleeps at most: it still has to notice who died."""


class Drive(Protocol):
    """Calls a core: work that is put in, its timers, its steps; all of it one after another."""

    def start(self, core: Core, deliver: Deliver) -> None:
        """Begin, for the loop that is running; ``deliver`` is called on it with what was said."""

    def put(self, work: Work) -> None:
        """Do this with the core, between two steps. It must not raise."""

    def tell(self, function: Callable[..., None], *values: object) -> None:
        """From inside work: have the event loop call something."""

    async def stop(self) -> None:
        """No step begins any more."""


class Threaded:
    """The one thread that touches the core: work comes in by an inbox, what was said goes out to the loop."""

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, core: Core, deliver: Deliver) -> None:
        """Begin to work."""
        self._core, self._deliver, self._loop = core, deliver, asyncio.get_running_loop()
        self._thread.start()

    def put(self, work: Work) -> None:
        """Put into the inbox."""
        self._inbox.put(work)

    def tell(self, function: Callable[..., None], *values: object) -> None:
        """On the loop, soon."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *values)

    async def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._inbox.put(None)
        until = time.monotonic() + LAST_STEP
        while self._thread.is_alive() and time.monotonic() < until:
            await asyncio.sleep(0.005)

    # ---- on the thread

    def _run(self) -> None:
        wait = math.inf  # seconds to the next thing that is due
        while self._obey(wait):
            said = self._core.tick(self._loop.time())
            if self._core.works:
                said += self._core.step(self._loop.time)
            if said:
                self.tell(self._deliver, said)
            wait = self._wait()

    def _wait(self) -> float:
        if self._core.works and not self._core.stalled:
            return 0.0
        return max(0.0, self._core.wake - self._loop.time())

    def _obey(self, wait: float) -> bool:
        """Do what the inbox holds; waits so long for something. False: stop."""
        try:
            work = self._inbox.get(timeout=min(wait, LONGEST_WAIT)) if wait else self._inbox.get_nowait()
            while True:
                if work is None:
                    return False
                work()
                work = self._inbox.get_nowait()
        except queue.Empty:
            return True


class Paced:
    """The event loop itself, each step so many seconds of its time long."""

    def __init__(self, seconds: float = 0.01) -> None:
        self.seconds = seconds
        self._busy: asyncio.TimerHandle | None = None
        self._stopped = False

    def start(self, core: Core, deliver: Deliver) -> None:
        """Begin to work."""
        self._core, self._deliver, self._loop = core, deliver, asyncio.get_running_loop()

    def put(self, work: Work) -> None:
        """Soon, on the loop."""
        self._loop.call_soon(self._do, work)

    def tell(self, function: Callable[..., None], *values: object) -> None:
        """On the loop, soon."""
        self._loop.call_soon(function, *values)

    async def stop(self) -> None:
        """At once."""
        self._stopped = True
        if self._busy is not None:
            self._busy.cancel()

    def _do(self, work: Work) -> None:
        if not self._stopped:
            work()
            self._plan()

    def _plan(self) -> None:
        """When the core is looked at next: after a step's time, or when something is due."""
        now = self._loop.time()
        soon = now + self.seconds if self._core.works and not self._core.stalled else math.inf
        when = min(soon, max(now, self._core.wake))
        if self._busy is not None and not self._busy.cancelled() and self._busy.when() <= when:
            return
        if self._busy is not None:
            self._busy.cancel()
        self._busy = None if when == math.inf else self._loop.call_at(when, self._turn)

    def _turn(self) -> None:
        self._busy = None
        said = self._core.tick(self._loop.time())
        if self._core.works:
            said += self._core.step(self._loop.time)
        if said:
            self.tell(self._deliver, said)
        self._plan()
