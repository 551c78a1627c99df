"""Ten thousand requests, a third of which are left at a random moment: memory, descriptors and pages stay flat."""

import asyncio
import gc
import os
import random
from pathlib import Path

import pytest

from tests.unit.serve.conftest import Served, Serving, leaving, run, serving

pytestmark = pytest.mark.slow

__all__ = ["serving"]  # the fixture

REQUESTS = int(os.environ.get("HELIOSTAT_SOAK", "10000"))
AT_ONCE = 32


def resident() -> int:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def one(served: Served, dice: random.Random) -> None:
    gone = asyncio.Event()
    body = {
        "model": dice.choice(["base", "solo", "math", "code", "plan"]),
        "prompt": " ".join(dice.choices(["one", "two", "three", "add", "hello"], k=dice.randint(1, 30))),
        "max_tokens": dice.randint(1, 8),
        "stream": dice.random() < 0.5,
        "n": dice.choice([1, 1, 1, 2]),
    }
    asked = asyncio.create_task(leaving(served.app, "/v1/completions", body, gone))
    if dice.random() < 0.33:
        await asyncio.sleep(dice.random() * 0.05)
        gone.set()
    await asked


async def many(served: Served, count: int, seed: int) -> None:
    dice, room = random.Random(seed), asyncio.Semaphore(AT_ONCE)

    async def limited() -> None:
        async with room:
            await one(served, dice)

    await asyncio.gather(*(limited() for _ in range(count)))
    assert served.service.in_flight == served.service.dispatcher.unfinished == 0
    assert await served.held() == 0


def test_nothing_grows(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            await many(served, max(500, REQUESTS // 10), seed=0)
            gc.collect()
            before = resident(), descriptors()
            for seed in range(1, 10):
                await many(served, REQUESTS // 10, seed=seed)
            served.log.seek(0)
            served.log.truncate()
            gc.collect()
            after = resident(), descriptors()
            assert after[1] <= before[1]
            assert after[0] - before[0] < 24, f"{before} MiB, descriptors became {after}"

    run(work(), seconds=3000)
