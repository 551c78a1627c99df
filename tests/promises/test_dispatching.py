"""A server's dispatcher over workers that come, go, fail and are late, on counted time: never wrong text, nothing leaks,
nothing hangs."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from msgspec.structs import replace

from heliostat.build import Loaded
from heliostat.clock import run_virtual
from heliostat.engine.request import Sampling
from heliostat.errors import Refused
from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.dispatch import Dispatcher
from heliostat.serve.dispatch_asked import Asked
from heliostat.serve.faults import Odds
from heliostat.serve.metrics import Metrics
from heliostat.serve.protocol import Order, Role
from heliostat.serve.trouble import Trouble
from heliostat.serve.worker import EngineWorker
from tests.promises.crews import Linked, assert_empty, linked, make_worker, order_of
from tests.promises.toys import ROWS, Exactness, Job, Served, make_engine, serve

READS = {row.prompt_writer for row in ROWS.values()}
SPEAKS = {name for row in ROWS.values() for name in (row.answer_writer, row.speaker)}
PACE = 0.01
"""Seconds of a step."""


@dataclass
class Crowd:
    """A dispatcher and its workers."""

    dispatcher: Dispatcher
    modules: Mapping[str, Loaded]
    tokenizer: Tokenizer
    options: dict[str, Any]
    odds: Odds | None = None
    inside: dict[str, EngineWorker] = field(default_factory=dict)
    lines: dict[str, Linked] = field(default_factory=dict)
    lives: int = 0

    async def join(self, name: str, role: Role, *, only: Iterable[str] | None = None) -> None:
        """A worker comes, behind a line where there are odds; it has what its role needs."""
        wanted = set(only if only is not None else READS if role == "prefill" else SPEAKS)
        self.lives += 1
        hosted = {module: self.modules[module] for module in sorted(wanted)}
        worker = make_worker(hosted, self.tokenizer, name=name, pace=PACE, **self.options)
        self.inside[name] = worker
        described = replace(await worker.describe(), roles=(role,))
        if self.odds is None:
            self.dispatcher.join(worker, described)
        else:
            self.lines[name] = linked(worker, seed=self.lives, odds=self.odds)
            self.dispatcher.join(self.lines[name].remote, described)

    async def dies(self, name: str) -> None:
        """A worker is gone, and all it had."""
        self.dispatcher.leave(name)
        if name in self.lines:
            await self.lines.pop(name).close()
        await self.inside.pop(name).close()

    async def empty(self) -> None:
        """Nothing is left anywhere."""
        await asyncio.sleep(60)
        assert self.dispatcher.unfinished == self.dispatcher.waiting == 0
        await assert_empty(*self.inside.values())
        for name in self.inside:
            assert self.dispatcher.router.outstanding(name) == (0, 0)


@asynccontextmanager
async def crowd(
    modules: Mapping[str, Loaded],
    tokenizer: Tokenizer,
    *,
    prefill: int = 2,
    decode: int = 2,
    odds: Odds | None = None,
    worker: Mapping[str, Any] | None = None,
    **options: Any,
) -> AsyncIterator[Crowd]:
    """So many workers of each role; ``options`` are the dispatcher's."""
    dispatcher = Dispatcher(Metrics(), **{"max_waiting": 1000, **options})
    made = Crowd(dispatcher, modules, tokenizer, dict(worker or {}), odds)
    for n in range(prefill):
        await made.join(f"p{n}", "prefill")
    for n in range(decode):
        await made.join(f"d{n}", "decode")
    yield made
    await dispatcher.stop()
    for name in list(made.inside):
        await made.dies(name)


def jobs_for(count: int, *, seed: int = 0, tokens: int = 9) -> list[Job]:
    """Requests of all rows, greedy and sampled, with common beginnings."""
    dice = random.Random(seed)
    stem = [dice.randrange(5, 250) for _ in range(24)]
    jobs = []
    for number in range(count):
        row = list(ROWS.values())[number % len(ROWS)]
        prompt = (*stem[: dice.randint(0, 20)], *(dice.randrange(5, 250) for _ in range(dice.randint(1, 8))))
        wish = Sampling(
            max_tokens=dice.randint(1, tokens),
            ignore_eos=True,
            logprobs=2,
            temperature=0.8 if number % 3 == 0 else 0.0,
            seed=number,
        )
        jobs.append(Job(row, prompt, wish))
    return jobs


async def told(asked: Asked) -> list[int]:
    """The tokens of an answer, as they come."""
    found: list[int] = []
    async for _, said in asked.pieces():
        assert said.number == len(found), "no token twice, none left out"
        found.append(said.sampled.token)
    return found


async def ask(dispatcher: Dispatcher, order: Order) -> list[int]:
    return await told(dispatcher.ask([order]))


def compare(found: Sequence[Sequence[int]], alone: Sequence[Served], exactness: Exactness) -> None:
    for ours, theirs in zip(found, alone, strict=True):
        exactness.same(tuple(ours), theirs.ids, theirs.gaps)


Toys = dict[str, Loaded]


def test_64_at_once_through_the_router_are_what_they_are_alone(
    modules: Toys, tokenizer: Tokenizer, exactness: Exactness
) -> None:
    engine = make_engine(modules, tokenizer)
    jobs = jobs_for(64)
    alone = serve(engine, jobs)

    async def work() -> None:
        async with crowd(modules, tokenizer) as made:
            orders = [order_of(job, engine.digests) for job in jobs]
            found = await asyncio.gather(*(ask(made.dispatcher, order) for order in orders))
            compare(found, alone, exactness)
            await made.empty()

    run_virtual(work())


@pytest.mark.parametrize("name", ["sun-a", "prefillshare-la", "icarus-la"])
def test_a_client_that_leaves_at_any_moment_leaves_nothing_behind(
    name: str, modules: Toys, tokenizer: Tokenizer
) -> None:
    """Queued, prefilled, lent, moved, waiting to be decoded, decoded, at the last token: every half step."""
    engine = make_engine(modules, tokenizer)
    wish = Sampling(max_tokens=5, ignore_eos=True)
    reached = set()

    async def work() -> None:
        async with crowd(
            modules, tokenizer, prefill=1, decode=1, worker={"max_tokens_per_step": 8, "max_running": 8}
        ) as made:
            for half in range(30):  # a prompt of its own, so that it has to be read
                job = Job(ROWS[name], tuple(range(20 + half, 41 + half)), wish)
                asked = made.dispatcher.ask([order_of(job, engine.digests)])
                await asyncio.sleep(half * PACE / 2 + PACE / 5)
                reached.add(asked.inbox.qsize())
                made.dispatcher.abort(asked)
                await made.empty()
            assert await ask(made.dispatcher, order_of(job, engine.digests))

    run_virtual(work())
    assert reached == {0, 1, 2, 3, 4, 5}, "it was left before the first token, after the last, and between"


@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_a_worker_that_dies_at_any_moment_changes_no_answer(
    victim: str, modules: Toys, tokenizer: Tokenizer, exactness: Exactness
) -> None:
    engine = make_engine(modules, tokenizer)
    jobs = jobs_for(12, seed=1)
    alone = serve(engine, jobs)
    retried = 0

    async def work(when: float, spare: bool) -> None:
        nonlocal retried
        count = 2 if spare else 1
        async with crowd(modules, tokenizer, prefill=count, decode=count, deadline=30.0) as made:
            orders = [order_of(job, engine.digests) for job in jobs]
            asking = [asyncio.ensure_future(ask(made.dispatcher, order)) for order in orders]
            await asyncio.sleep(when)
            await made.dies(victim)
            if not spare:
                await asyncio.sleep(0.5)
                await made.join(victim, "prefill" if victim == "p0" else "decode")
            compare(await asyncio.gather(*asking), alone, exactness)
            metrics = made.dispatcher.metrics.text().decode()
            retried += "heliostat_retries_total{" in metrics
            await made.empty()

    for step in range(16):
        run_virtual(work(step * PACE / 3, spare=bool(step % 2)))
    assert retried > 3, "somebody was in the middle of something"


def test_without_who_reads_the_prompt_a_request_waits_to_its_deadline(
    modules: Toys, tokenizer: Tokenizer
) -> None:
    engine = make_engine(modules, tokenizer)

    async def work() -> None:
        async with crowd(modules, tokenizer, prefill=0, decode=0, deadline=5.0) as made:
            await made.join("d", "decode", only=["base", "b", "c"])
            loop = asyncio.get_running_loop()
            began = loop.time()
            job = Job(ROWS["sun-a"], (5, 6, 7), Sampling(max_tokens=3, ignore_eos=True))
            with pytest.raises(Trouble) as trouble:
                await ask(made.dispatcher, order_of(job, engine.digests))
            assert trouble.value.status == 503 and "reads prompts with 'a'" in str(trouble.value)
            assert loop.time() - began == pytest.approx(5.0)
            assert made.inside["d"].core.engine.runner.ran.rows == {}, "nobody stood in for it"
            waiting = asyncio.ensure_future(ask(made.dispatcher, order_of(job, engine.digests)))
            await asyncio.sleep(2)
            assert made.dispatcher.waiting == 1
            await made.join("p", "prefill", only=["a"])
            assert len(await waiting) == 3, "it came in time"
            made.dispatcher.leave("p")
            base = Job(ROWS["base-speaks"], (5, 6, 7), Sampling(max_tokens=3, ignore_eos=True))
            with pytest.raises(Trouble, match="answers with 'a' and 'base'"):
                await ask(made.dispatcher, order_of(base, engine.digests))

    run_virtual(work())


def test_without_workers_that_prefill_who_has_the_module_does_it(
    modules: Toys, tokenizer: Tokenizer, exactness: Exactness
) -> None:
    engine = make_engine(modules, tokenizer)
    jobs = [job for job in jobs_for(30) if job.row.prompt_writer in ("base", "a")]
    alone = serve(engine, jobs)

    async def work() -> None:
        async with crowd(modules, tokenizer, prefill=0, decode=0, deadline=9.0) as made:
            await made.join("d", "decode", only=modules)
            orders = [order_of(job, engine.digests) for job in jobs]
            compare(await asyncio.gather(*(ask(made.dispatcher, o) for o in orders)), alone, exactness)

    run_virtual(work())


def test_a_full_house_says_when_to_come_back_and_serves_who_does(modules: Toys, tokenizer: Tokenizer) -> None:
    engine = make_engine(modules, tokenizer)

    async def work() -> None:
        options = {"max_running": 2}
        async with crowd(modules, tokenizer, prefill=1, decode=1, worker=options, max_waiting=3) as made:
            orders = [order_of(job, engine.digests) for job in jobs_for(6)]
            asking = [asyncio.ensure_future(told(made.dispatcher.ask([order]))) for order in orders[:5]]
            with pytest.raises(Trouble) as trouble:
                made.dispatcher.ask([orders[5]])
            assert trouble.value.status == 429 and int(trouble.value.headers["Retry-After"]) >= 1
            await asyncio.gather(*asking)
            assert await ask(made.dispatcher, orders[5])
            await made.empty()

    run_virtual(work())


def test_a_prompt_that_is_too_long_is_told_at_once_and_nobody_waits_for_it(
    modules: Toys, tokenizer: Tokenizer
) -> None:
    engine = make_engine(modules, tokenizer)

    async def work() -> None:
        async with crowd(modules, tokenizer) as made:
            began = asyncio.get_running_loop().time()
            for row in ROWS.values():
                job = Job(row, (7,) * 200, Sampling(max_tokens=3))
                with pytest.raises(Refused, match="200 tokens"):
                    await ask(made.dispatcher, order_of(job, engine.digests))
            assert asyncio.get_running_loop().time() - began < 1
            await made.empty()

    run_virtual(work())


def test_after_a_storm_of_aborts_all_is_as_before(modules: Toys, tokenizer: Tokenizer) -> None:
    engine = make_engine(modules, tokenizer)
    dice = random.Random(5)

    async def work() -> None:
        async with crowd(modules, tokenizer) as made:
            loop = asyncio.get_running_loop()

            async def batch(seed: int) -> float:
                began = loop.time()
                orders = [order_of(job, engine.digests) for job in jobs_for(40, seed=seed)]
                await asyncio.gather(*(ask(made.dispatcher, order) for order in orders))
                return loop.time() - began

            await batch(2)
            usual = await batch(2)
            storm = [made.dispatcher.ask([order_of(j, engine.digests)]) for j in jobs_for(200, seed=3)]
            left = dice.sample(storm, 180)
            for asked in left:
                await asyncio.sleep(dice.random() * PACE)
                made.dispatcher.abort(asked)
            stayed = [asked for asked in storm if asked not in left]
            assert all(await asyncio.gather(*(told(asked) for asked in stayed)))
            assert await batch(2) <= usual / 0.9
            await made.empty()

    run_virtual(work())


def test_one_of_several_choices_that_fails_takes_the_others_along(
    modules: Toys, tokenizer: Tokenizer
) -> None:
    engine = make_engine(modules, tokenizer)

    async def work() -> None:
        async with crowd(modules, tokenizer) as made:
            good, other = (order_of(job, engine.digests) for job in jobs_for(2, tokens=40))
            bad = replace(other, prompt=(10**6,) * 4)
            with pytest.raises(Refused, match="token ids"):
                await told(made.dispatcher.ask([good, bad]))
            await made.empty()

    run_virtual(work())


ODDS = Odds(drop=0.02, delay=0.05, duplicate=0.03, truncate=0.01, flip=0.01, silence=0.001)


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_the_lines_do_answers_are_right_or_there_is_none(
    seed: int, modules: Toys, tokenizer: Tokenizer, exactness: Exactness
) -> None:
    engine = make_engine(modules, tokenizer)
    jobs = jobs_for(60, seed=seed)
    alone = serve(engine, jobs)

    async def work() -> None:
        async with crowd(modules, tokenizer, odds=ODDS, deadline=120.0, worker={"lease": 5.0}) as made:
            orders = [order_of(job, engine.digests) for job in jobs]
            found = await asyncio.gather(
                *(ask(made.dispatcher, order) for order in orders), return_exceptions=True
            )
            right = 0
            for ours, theirs in zip(found, alone, strict=True):
                assert isinstance(ours, list | Trouble), ours
                if isinstance(ours, list):
                    exactness.same(tuple(ours), theirs.ids, theirs.gaps)
                    right += 1
            assert right > 55, found
            assert asyncio.get_running_loop().time() < 130
            await made.empty()

    run_virtual(work())


@pytest.mark.parametrize("name", ["sun-a", "prefillshare-la"])
def test_where_the_time_went_adds_up_and_who_waited_is_known(
    name: str, modules: Toys, tokenizer: Tokenizer
) -> None:
    """Four long prompts at one worker that reads eight tokens a step, over pages that travel one a step."""
    engine = make_engine(modules, tokenizer)
    wish = Sampling(max_tokens=6, ignore_eos=True)

    async def work() -> None:
        options = {"max_tokens_per_step": 8, "max_running": 8}
        async with crowd(modules, tokenizer, prefill=1, decode=1, worker=options) as made:
            made.inside["d0"].core.engine.arrivals.step_bytes = 1
            jobs = [Job(ROWS[name], tuple(range(10 * n, 10 * n + 33)), wish) for n in range(1, 5)]
            asked = [made.dispatcher.ask([order_of(job, engine.digests)]) for job in jobs]
            await asyncio.gather(*(told(one) for one in asked))
            found = [one.requests[0].timings for one in asked]
            for timings in found:
                assert min(timings.values()) >= 0
                parts = sum(timings.values()) - timings["total"]
                assert parts == pytest.approx(timings["total"], abs=4 * PACE), timings
                assert timings["prefill"] >= 2.9 * PACE, "four steps of eight positions"
                assert timings["transfer"] >= PACE, "several pages, one a step"
                assert timings["decode"] >= 4.9 * PACE
            queued = [timings["queue"] for timings in found]
            assert queued == sorted(queued) and queued[-1] > queued[0] + 10 * PACE
            metrics = made.dispatcher.metrics.text().decode()
            for phase in ("queue", "prefill", "transfer", "decode"):
                lines = [x for x in metrics.splitlines() if x.startswith("heliostat_phase_seconds_sum")]
                sums = sum(float(x.split()[-1]) for x in lines if f'phase="{phase}"' in x)
                assert sums >= sum(timings[phase] for timings in found) - 0.2 * (phase == "decode")

    run_virtual(work())
