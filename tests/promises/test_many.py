"""Five hundred requests at once, over eight members of every row: each answer is what it is alone."""

import asyncio
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heliostat.llm import LLM
from heliostat.serve.dialect import TextAsking
from heliostat.serve.keys import OPEN
from tests.unit.serve.conftest import Served, Serving, engine_of, run, serving

__all__ = ["serving"]  # the fixture

REQUESTS = 500
MORE = {"math2": ("sun", "lora"), "code2": ("prefillshare", "lora"), "plan2": ("icarus", "full")}
WORDS = ["one", "two", "three", "add", "hello", "and", "5", "the"]


@pytest.fixture(scope="module")
def eight(
    tiny_family_made: Path, tiny_data: Path, tune_member: Callable[..., Any], tmp_path_factory: Any
) -> Path:
    """The base and seven members: two of each sharing."""
    folder = Path(shutil.copytree(tiny_family_made, tmp_path_factory.mktemp("eight") / "fam"))
    for member, (sharing, tuner) in MORE.items():
        tune_member(folder, member, sharing, tiny_data, tuner=tuner, max_steps=3, seed=2)
    return folder


def asked(number: int, members: list[str]) -> dict[str, Any]:
    """One request; many have a beginning in common, half are greedy, the others sampled with a seed."""
    dice = random.Random(number)
    shared = " ".join(random.Random(number % 7).choices(WORDS, k=12))
    return {
        "model": members[number % len(members)],
        "prompt": f"{shared} {' '.join(dice.choices(WORDS, k=dice.randint(0, 12)))}",
        "max_tokens": dice.randint(1, 12),
        "temperature": dice.choice([0.0, 0.9]),
        "seed": number,
        "ignore_eos": True,
    }


async def answered(served: Served, body: dict[str, Any]) -> list[int]:
    job = await served.service.complete(TextAsking(**body), OPEN)
    try:
        async for place, piece in job.asked.pieces():
            job.voices[place].hear(piece)
        return list(job.asked.requests[0].answer)
    finally:
        job.finish()


def test_at_once_as_alone(serving: Serving, eight: Path) -> None:
    llm = LLM(eight, dtype="float32", cache_mib=16)
    members = sorted(llm.rows)
    assert len(members) == 8
    bodies = [asked(number, members) for number in range(REQUESTS)]

    async def work() -> None:
        options: dict[str, Any] = {"family": eight, "cache_mib": 1, "max_waiting": REQUESTS}
        async with serving(**options) as served:
            found = await asyncio.gather(*(answered(served, body) for body in bodies))
            engine = engine_of(served.service)
            assert await served.held() == 0 and served.service.in_flight == 0
            assert engine.table.counters.shared_hits.total() > 0, "members have read what others wrote"
            assert engine.table.counters.evictions > 0, "there was no room for all"
        for body, ids in zip(bodies, found, strict=True):
            assert list(alone(llm, body)) == ids, body

    run(work(), seconds=500)


def alone(llm: LLM, body: dict[str, Any]) -> tuple[int, ...]:
    """The answer when nothing else runs."""
    ids = llm.tokenizer.plain_prompt_ids(body["prompt"])
    fields = {name: body[name] for name in ("max_tokens", "temperature", "seed", "ignore_eos")}
    return llm.generate([ids], member=body["model"], **fields)[0].ids
