"""What keeps a core going: work between steps, timers while nothing is to be done, and an end."""

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest

from heliostat.clock import run_virtual
from heliostat.serve.protocol import no
from heliostat.serve.worker_core import Event
from heliostat.serve.worker_drive import Drive, Paced, Threaded


class Counting:
    """A core that says a number a step, while it has any, and something when its time has come."""

    def __init__(self) -> None:
        self.left = 0
        self.stuck = False
        self.wake = math.inf
        self.steps = 0
        self.threads: set[str] = set()

    @property
    def works(self) -> bool:
        return bool(self.left)

    @property
    def stalled(self) -> bool:
        return self.stuck

    def tick(self, now: float) -> list[Event]:
        if now < self.wake:
            return []
        self.wake, self.stuck = math.inf, False
        return [no("tick", "deadline", "")]

    def step(self, clock: Callable[[], float]) -> list[Event]:
        self.threads.add(threading.current_thread().name)
        self.steps += 1
        if self.stuck:
            return []
        self.left -= 1
        return [no(str(self.left), "busy", "")]


def play(drive: Drive, *, virtual: bool) -> Any:
    core = Counting()
    heard: list[str] = []

    async def until(count: int) -> None:
        while len(heard) < count:
            await asyncio.sleep(0.001)

    async def work() -> None:
        loop = asyncio.get_running_loop()
        drive.start(core, lambda events: heard.extend(event.order for event in events))  # type: ignore[arg-type]

        def more() -> None:
            core.left += 3

        drive.put(more)
        await until(3)
        assert heard == ["2", "1", "0"]

        def later() -> None:
            core.wake = loop.time() + 0.02

        drive.put(later)
        await until(4)
        assert heard[3] == "tick"

        def stuck() -> None:
            core.left, core.stuck, core.wake = 1, True, loop.time() + 0.05

        before = core.steps
        drive.put(stuck)
        await until(6)
        assert heard[4:] == ["tick", "0"] and core.steps - before <= 3, "it does not spin while it is stuck"
        told = asyncio.Event()
        drive.put(lambda: drive.tell(told.set))
        await told.wait()
        await drive.stop()
        drive.put(more)
        await asyncio.sleep(0.02)
        assert len(heard) == 6

    if virtual:
        run_virtual(work())
    else:
        asyncio.run(asyncio.wait_for(work(), 30))
    return core


def test_on_a_thread_of_its_own() -> None:
    assert play(Threaded(), virtual=False).threads == {"engine"}


@pytest.mark.parametrize("seconds", [0.001, 0.5])
def test_on_the_loop_at_a_pace(seconds: float) -> None:
    assert play(Paced(seconds), virtual=True).threads == {"MainThread"}
