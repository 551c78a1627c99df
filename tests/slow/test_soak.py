"""Thousands of requests, a third of which are left at a random moment: memory, descriptors and pages stay flat.

Ten thousand for toys, whose steps are short; two thousand, with longer texts, for members of the embedded base.
"""

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


async def one(served: Served, dice: random.Random, longer: int) -> None:
    gone = asyncio.Event()
    words = dice.choices(["one", "two", "three", "add", "hello"], k=dice.randint(1, 30 * longer))
    body = {
        "model": dice.choice(["base", "solo", "math", "code", "plan"]),
        "prompt": " ".join(words),
        "max_tokens": dice.randint(1, 8 * longer),
        "stream": dice.random() < 0.5,
        "n": dice.choice([1, 1, 1, 2]),
    }
    asked = asyncio.create_task(leaving(served.app, "/v1/completions", body, gone))
    if dice.random() < 0.33:
        await asyncio.sleep(dice.random() * 0.05)
        gone.set()
    await asked


async def many(served: Served, count: int, seed: int, *, longer: int = 1) -> None:
    dice, room = random.Random(seed), asyncio.Semaphore(AT_ONCE)

    async def limited() -> None:
        async with room:
            await one(served, dice, longer)

    await asyncio.gather(*(limited() for _ in range(count)))
    assert served.service.in_flight == served.service.dispatcher.unfinished == 0
    assert await served.held() == 0


async def flat(served: Served, rounds: int, count: int, *, longer: int = 1) -> None:
    """After a first round nothing grows any more."""
    await many(served, max(500, count), seed=0, longer=longer)
    gc.collect()
    before = resident(), descriptors()
    for seed in range(1, rounds):
        await many(served, count, seed=seed, longer=longer)
    served.log.seek(0)
    served.log.truncate()
    gc.collect()
    after = resident(), descriptors()
    assert after[1] <= before[1]
    assert after[0] - before[0] < 24, f"{before} MiB, descriptors became {after}"


def test_nothing_grows(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            await flat(served, 10, REQUESTS // 10)

    run(work(), seconds=3000)


def test_nothing_grows_with_members_of_the_embedded_base(serving: Serving, embedded_family: Path) -> None:
    async def work() -> None:
        async with serving(family=embedded_family, cache_mib=32) as served:
            await flat(served, 4, REQUESTS // 20, longer=5)

    run(work(), seconds=3000)
