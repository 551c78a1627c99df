"""An event loop whose time is counted, not lived through: hours of waiting pass in a moment, the same every time.

When nothing is ready the loop jumps to its next timer. What would run on another thread runs at once instead, so
that nothing depends on how fast the machine is. Sockets and processes have no place on it.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time begins at 0, in seconds."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Leap(self))

    def time(self) -> float:
        """Seconds since it began, all of them counted."""
        return self._now

    def leap(self, seconds: float) -> None:
        """Let so much time be over."""
        self._now += seconds

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """``func`` runs now, on this thread."""
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


class _Leap(selectors.DefaultSelector):
    """Looks once and never waits."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; where nothing is, the time that might have been waited for it is over."""
        ready = super().select(0)
        if timeout is None and not ready:
            raise RuntimeError("everybody waits, and nothing is ever going to happen: a deadlock")
        if timeout and not ready:
            self._loop.leap(timeout)
        return ready


def run_virtual(work: Coroutine[Any, Any, T]) -> T:
    """``work``'s result, after as much counted time as it takes."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
