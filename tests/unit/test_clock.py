"""The loop whose time is counted: long waits take no time, and the same story comes out every time."""

import asyncio
import time

import pytest

from heliostat.clock import run_virtual


def test_hours_pass_in_a_moment_and_in_order() -> None:
    async def story() -> list[tuple[float, str]]:
        loop, told = asyncio.get_running_loop(), []

        async def say(what: str, after: float) -> None:
            await asyncio.sleep(after)
            told.append((round(loop.time(), 6), what))

        await asyncio.gather(say("late", 7200), say("soon", 0.5), say("now", 0))
        return told

    began = time.monotonic()
    assert run_virtual(story()) == [(0, "now"), (0.5, "soon"), (7200, "late")]
    assert time.monotonic() - began < 5
    assert run_virtual(story()) == run_virtual(story())


def test_a_timeout_is_of_counted_time_too() -> None:
    async def story() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1000):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert run_virtual(story()) == pytest.approx(1000)


def test_what_would_run_on_another_thread_runs_at_once() -> None:
    async def story() -> tuple[int, float]:
        found = await asyncio.to_thread(sum, [1, 2, 3])
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        return found, asyncio.get_running_loop().time()

    assert run_virtual(story()) == (6, 0.0)


def test_where_everybody_waits_for_ever_it_says_so() -> None:
    async def story() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="deadlock"):
        run_virtual(story())
