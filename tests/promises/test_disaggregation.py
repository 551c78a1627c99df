"""Prefill here, decode there: the answers are those of one process, token for token, in every row."""

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest

from heliostat.build import Loaded
from heliostat.clock import run_virtual
from heliostat.engine.request import Sampling
from heliostat.family import Row
from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.worker_drive import Threaded
from tests.promises.crews import Listener, assert_empty, crowd, make_worker, order_of
from tests.promises.toys import PAGE, ROWS, Exactness, Job, make_engine, serve

LENGTHS = (1, 2, PAGE - 1, PAGE, PAGE + 1, PAGE + 2, 2 * PAGE, 3 * PAGE + 1, 23)


def jobs_of(rows: Mapping[str, Row], *, sampled: bool = False, repeats: int = 1) -> list[Job]:
    """Prompts with common beginnings, their ends around the borders of pages."""
    dice = random.Random(7)
    stem = [dice.randrange(5, 250) for _ in range(max(LENGTHS))]
    jobs = []
    for number, (row, length) in enumerate((r, n) for r in rows.values() for n in LENGTHS * repeats):
        keep = dice.randint(0, length)
        prompt = (*stem[:keep], *(dice.randrange(5, 250) for _ in range(length - keep)))
        temperature = 0.8 if sampled and number % 2 else 0.0
        wish = Sampling(
            max_tokens=dice.randint(1, 9), ignore_eos=True, logprobs=2, temperature=temperature, seed=number
        )
        jobs.append(Job(row, prompt, wish))
    return jobs


def halves(modules: Mapping[str, Loaded], row: Row) -> tuple[dict[str, Loaded], dict[str, Loaded]]:
    """The modules that prefill needs, and those that decoding needs."""
    return (
        {row.prompt_writer: modules[row.prompt_writer]},
        {name: modules[name] for name in (row.answer_writer, row.speaker)},
    )


@pytest.mark.parametrize("name", ROWS)
def test_each_row_between_workers_that_host_only_their_half(
    name: str, modules: dict[str, Loaded], tokenizer: Tokenizer, exactness: Exactness
) -> None:
    engine = make_engine(modules, tokenizer)
    jobs = jobs_of({name: ROWS[name]})
    alone = serve(engine, jobs)

    async def apart() -> None:
        first, second = (
            make_worker(half, tokenizer, name=part)
            for half, part in zip(halves(modules, ROWS[name]), ("prefill", "decode"), strict=True)
        )
        orders = [order_of(job, engine.digests) for job in jobs]
        found = await crowd(orders, second, first)
        for ours, theirs in zip(found, alone, strict=True):
            exactness.same(ours.ids, theirs.ids, theirs.gaps)
            if ours.ids == theirs.ids:
                assert ours.chances == pytest.approx(theirs.logprobs, abs=1e-4)
            assert ours.failures == ()
        ran = second.core.engine.runner.ran.rows
        assert set(ran) <= set(halves(modules, ROWS[name])[1])
        await assert_empty(first, second)
        await first.close()
        await second.close()

    run_virtual(apart())


def everyone(modules: Mapping[str, Loaded]) -> tuple[dict[str, Loaded], dict[str, Loaded]]:
    """The modules that prefill needs for all rows, and those that decoding needs: here none is the other's."""
    rows = list(ROWS.values())
    return (
        {name: modules[name] for row in rows for name in [row.prompt_writer]},
        {name: modules[name] for row in rows for name in (row.answer_writer, row.speaker)},
    )


@pytest.mark.parametrize(
    ("pages", "lease"), [(400, 30.0), (30, 30.0), (30, 0.03)], ids=["roomy", "tiny pools", "short leases"]
)
def test_64_at_once_over_all_rows(
    pages: int, lease: float, modules: dict[str, Loaded], tokenizer: Tokenizer, exactness: Exactness
) -> None:
    engine = make_engine(modules, tokenizer)
    dice = random.Random(3)
    jobs = dice.sample(jobs_of(ROWS, sampled=True), 64)
    alone = serve(engine, jobs)

    async def apart() -> None:
        first, second = (
            make_worker(half, tokenizer, name=part, pages=pages, lease=lease)
            for half, part in zip(everyone(modules), ("prefill", "decode"), strict=True)
        )
        orders = [order_of(job, engine.digests) for job in jobs]
        found = await crowd(orders, second, first, tries=2000)
        for ours, theirs in zip(found, alone, strict=True):
            exactness.same(ours.ids, theirs.ids, theirs.gaps)
        failures = {code for told in found for code in told.failures}
        assert failures <= {"busy", "pages_gone", "late", "pages_lost"}
        await assert_empty(first, second)
        await first.close()
        await second.close()

    run_virtual(apart())


def test_64_at_once_on_real_threads(
    modules: dict[str, Loaded], tokenizer: Tokenizer, exactness: Exactness
) -> None:
    engine = make_engine(modules, tokenizer)
    jobs = random.Random(4).sample(jobs_of(ROWS, sampled=True), 64)
    alone = serve(engine, jobs)

    async def apart() -> None:
        first, second = (
            make_worker(half, tokenizer, name=part, pages=40, drive=Threaded())
            for half, part in zip(everyone(modules), ("prefill", "decode"), strict=True)
        )
        orders = [order_of(job, engine.digests) for job in jobs]
        async with asyncio.timeout(100):
            found = await crowd(orders, second, first, tries=2000)
            for ours, theirs in zip(found, alone, strict=True):
                exactness.same(ours.ids, theirs.ids, theirs.gaps)
            await assert_empty(first, second)
        await first.close()
        await second.close()

    asyncio.run(apart())


WORDS = ["one", "two", "three", "add", "hello", "and", "5", "the"]
SCHEMA = '{"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"]}'


@pytest.mark.parametrize("name", ["sun-a", "prefillshare-la", "icarus-la", "independent-a", "three-mixed"])
@pytest.mark.parametrize("kind", ["grammar", "stop string", "penalties", "resumed"])
def test_what_sampling_needs_to_remember_goes_along(
    kind: str, name: str, modules: dict[str, Loaded], tokenizer: Tokenizer
) -> None:
    """Grammars, stop strings that span tokens, penalties and held-back text are those of one process."""
    row = ROWS[name]
    wish = {
        "grammar": Sampling(max_tokens=95),
        "stop string": Sampling(max_tokens=16, ignore_eos=True, temperature=1.0, seed=5),
        "penalties": Sampling(
            max_tokens=10, ignore_eos=True, frequency_penalty=1.5, presence_penalty=1.0, logit_bias={17: 4.0}
        ),
        "resumed": Sampling(max_tokens=12, ignore_eos=True, temperature=1.0, seed=2),
    }[kind]
    prompt = tuple(tokenizer.plain_prompt_ids(" ".join(WORDS)))

    async def apart() -> None:
        whole = make_worker(modules, tokenizer, name="whole")
        halved = halves(modules, row)
        first, second = (
            make_worker(half, tokenizer, name=part)
            for half, part in zip(halved, ("prefill", "decode"), strict=True)
        )
        job = Job(row, prompt, wish)
        digests = whole.core.engine.digests
        more = {"schema": SCHEMA} if kind == "grammar" else {}
        if kind == "stop string":
            (free,) = await crowd([order_of(job, digests)], whole)
            stop = free.text[5:8]
            job = Job(row, prompt, replace(wish, stop=(stop,)))
        order = order_of(job, digests, **more)
        (alone,) = await crowd([order], whole)
        if kind == "resumed":
            for place in range(1, len(alone.ids)):
                rest = order_of(job, digests, answer=alone.ids[:place])
                (told,) = await crowd([rest], second, first)
                assert told.ids == alone.ids[place:] and alone.text.endswith(told.text)
        (told,) = await crowd([order_of(job, digests, **more)], second, first)
        assert told == alone
        if kind == "grammar":
            # A toy may well use up its tokens on the white space that the grammar allows.
            assert told.finish == "length" or json.loads(told.text)["a"] in (1, 22)
        if kind == "stop string":
            assert told.finish == "stop" and stop not in told.text
        await assert_empty(first, second, whole)

    run_virtual(apart())


def test_text_that_is_told_so_far_and_text_that_follows_are_the_whole(
    modules: dict[str, Loaded], tokenizer: Tokenizer
) -> None:
    """Where an answer goes on after each of its tokens, no character is told twice or lost."""
    job = Job(
        ROWS["independent-a"], (9, 8, 7), Sampling(max_tokens=16, ignore_eos=True, temperature=1.0, seed=9)
    )

    async def apart() -> None:
        worker = make_worker(modules, tokenizer)
        listener = Listener()
        digests = worker.core.engine.digests
        assert await worker.decode(order_of(job, digests), listener.hear) is None
        await listener.ended.wait()
        texts = [said.text for said in listener.said]
        ids = tuple(said.sampled.token for said in listener.said)
        for place in range(1, len(ids)):
            (told,) = await crowd([order_of(job, digests, answer=ids[:place])], worker)
            assert told.text == "".join(texts[place:]) and told.ids == ids[place:]

    run_virtual(apart())
