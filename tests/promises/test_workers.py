"""Workers when things go wrong: nothing leaks, nothing hangs, and never is a page read that is another's by now."""

import asyncio
import random
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from heliostat.build import Loaded
from heliostat.clock import run_virtual
from heliostat.engine.request import Sampling
from heliostat.family import Row
from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.protocol import Failed, Handed, Handle, Order, Said
from heliostat.serve.worker import EngineWorker
from heliostat.serve.worker_core import TIDY_SECONDS
from tests.promises.crews import Listener, answered, assert_empty, make_worker, order_of
from tests.promises.toys import PAGE, Job, make_engine, serve

ROW = Row("base", "a", "a", "a")
PROMPT = tuple(range(5, 5 + 5 * PAGE + 2))
Modules = Mapping[str, Loaded]


def job(prompt: tuple[int, ...] = PROMPT, *, max_tokens: int = 6, row: Row = ROW) -> Job:
    return Job(row, prompt, Sampling(max_tokens=max_tokens, ignore_eos=True, logprobs=2))


def workers(modules: Modules, tokenizer: Tokenizer, **options: Any) -> tuple[EngineWorker, EngineWorker]:
    """One that hosts the base and prefills, one that hosts the member's module and decodes."""
    return (
        make_worker({"base": modules["base"]}, tokenizer, name="prefill", **options),
        make_worker({"a": modules["a"]}, tokenizer, name="decode", **options),
    )


def digests_of(*workers: EngineWorker) -> dict[str, str]:
    return {name: digest for worker in workers for name, digest in worker.core.engine.digests.items()}


async def handed(worker: EngineWorker, order: Order) -> Handle:
    """The handle of an order that is prefilled."""
    found = await worker.prefill(order)
    assert isinstance(found, Handed) and found.handle is not None, found
    return found.handle


async def steps(worker: EngineWorker, count: float) -> None:
    """So many steps' time."""
    await asyncio.sleep(0.01 * count + 0.001)


# ---- an abort at each of seven points


async def in_the_queue(first: EngineWorker, second: EngineWorker, order: Order) -> None:
    task = asyncio.ensure_future(first.prefill(order))
    await asyncio.sleep(0)
    first.abort(order.id)
    assert (await task).code == "aborted"  # type: ignore[union-attr]


async def in_prefill(first: EngineWorker, second: EngineWorker, order: Order) -> None:
    first.core.engine.scheduler.max_tokens_per_step = 4
    first.core.engine.scheduler.max_running = 4
    task = asyncio.ensure_future(first.prefill(order))
    await steps(first, 2)
    assert 0 < first.core.engine.scheduler.running[0].computed < len(PROMPT) - 1
    task.cancel()
    await asyncio.sleep(0)


async def when_prefilled(first: EngineWorker, second: EngineWorker, order: Order) -> None:
    await handed(first, order)
    assert first.core.engine.scheduler.handed
    first.abort(order.id)


async def in_transfer(first: EngineWorker, second: EngineWorker, order: Order) -> None:
    handle = await handed(first, order)
    second.core.engine.arrivals.step_bytes = 1  # a page a step
    listener = Listener()
    assert await second.decode(order, listener.hear, handle) is None
    await steps(second, 2)
    (arriving,) = second.core.engine.scheduler.arriving
    assert 0 < arriving.computed < arriving.boundary
    second.abort(order.id)
    first.release(handle)


async def waiting_to_decode(first: EngineWorker, second: EngineWorker, order: Order) -> None:
    handle = await handed(first, order)
    listener = Listener()
    second.core.engine.scheduler.max_running = 0
    assert await second.decode(order, listener.hear, handle) is None
    await steps(second, 2)
    assert second.core.engine.scheduler.waiting
    second.abort(order.id)
    first.release(handle)
    await steps(second, 1)
    second.core.engine.scheduler.max_running = 64


async def while_decoding(first: EngineWorker, second: EngineWorker, order: Order) -> None:
    handle = await handed(first, order)
    listener = Listener()
    assert await second.decode(order, listener.hear, handle) is None
    while len(listener.said) < 2:
        await steps(second, 1)
    first.release(handle)
    second.abort(order.id)
    heard = len(listener.said)
    await steps(second, 5)
    assert len(listener.said) == heard, "nothing is heard of it any more"


async def at_the_last_token(first: EngineWorker, second: EngineWorker, order: Order) -> None:
    handle = await handed(first, order)
    listener = Listener()

    def hear(event: Said | Failed) -> None:
        listener.hear(event)
        if isinstance(event, Said) and event.finish is not None:
            second.abort(order.id)

    assert await second.decode(order, hear, handle) is None
    await listener.ended.wait()
    first.abort(order.id)


POINTS = [
    in_the_queue,
    in_prefill,
    when_prefilled,
    in_transfer,
    waiting_to_decode,
    while_decoding,
    at_the_last_token,
]


@pytest.mark.parametrize("point", POINTS)
def test_an_abort_at_each_point_returns_all_pages(
    point: Callable[..., Awaitable[None]], modules: Modules, tokenizer: Tokenizer
) -> None:
    async def story() -> None:
        first, second = workers(modules, tokenizer)
        digests = digests_of(first, second)
        await point(first, second, order_of(job(), digests))
        await steps(first, 1)
        await assert_empty(first, second)
        told = await answered(order_of(job(), digests), second, first)
        (alone,) = serve(make_engine(modules, tokenizer), [job()])
        assert told.ids == alone.ids, "and the next request is answered"
        await assert_empty(first, second)

    run_virtual(story())


# ---- pages that are somebody else's by now


def test_pages_of_a_lease_that_is_over_are_refused_when_another_has_them(
    modules: Modules, tokenizer: Tokenizer
) -> None:
    async def story() -> None:
        first, second = workers(modules, tokenizer, pages=8, lease=0.5)
        digests = digests_of(first, second)
        order = order_of(job(), digests)
        handle = await handed(first, order)
        await asyncio.sleep(0.6)
        assert first.core.idle, "the lease is over"
        other = order_of(job(tuple(range(90, 90 + 6 * PAGE))), digests)
        kept = await handed(first, other)
        assert set(kept.pages) & set(handle.pages), "there was no room for both"
        listener = Listener()
        late = msgspec.structs.replace(handle, lease=10.0)
        assert await second.decode(order, listener.hear, late) is None
        await listener.ended.wait()
        assert listener.failed is not None and listener.failed.code == "pages_gone" and listener.failed.retry
        assert listener.said == []
        first.release(kept)
        await steps(first, 1)
        await assert_empty(first, second)

    run_virtual(story())


def test_an_order_that_still_waits_when_its_lease_is_over_fails_then(
    modules: Modules, tokenizer: Tokenizer
) -> None:
    async def story() -> None:
        first, second = workers(modules, tokenizer, lease=0.5)
        order = order_of(job(), digests_of(first, second))
        handle = await handed(first, order)
        second.core.engine.scheduler.max_running = 0
        listener = Listener()
        assert await second.decode(order, listener.hear, handle) is None
        began = asyncio.get_running_loop().time()
        await listener.ended.wait()
        assert listener.failed is not None and listener.failed.code == "late" and listener.failed.retry
        assert asyncio.get_running_loop().time() - began == pytest.approx(0.5, abs=0.02)
        await steps(first, 1)
        await assert_empty(first, second)

    run_virtual(story())


def test_memory_of_the_dead_is_given_up_while_nothing_is_asked(
    modules: Modules, tokenizer: Tokenizer
) -> None:
    async def story() -> None:
        first, second = workers(modules, tokenizer)
        told = await answered(order_of(job(), digests_of(first, second)), second, first)
        assert told.ids
        store, shelves = first.core.engine.store, second.core.lending.shelves
        assert store is not None
        memory = weakref.ref(shelves.look(store.name).content.obj)
        await first.close()
        second.core.tick(asyncio.get_running_loop().time() + TIDY_SECONDS)
        assert memory() is None

    run_virtual(story())


def test_an_abort_in_transfer_leaves_nobody_who_writes_into_the_next_owners_page(
    modules: Modules, tokenizer: Tokenizer
) -> None:
    """The late writer: its pages go to another request at once, and that one's answer is right."""

    async def story() -> None:
        first, second = workers(modules, tokenizer, pages=9)
        digests = digests_of(first, second)
        order = order_of(job(), digests)
        handle = await handed(first, order)
        second.core.engine.arrivals.step_bytes = 1
        assert await second.decode(order, Listener().hear, handle) is None
        await steps(second, 2)
        taken = set(second.core.engine.scheduler.arriving[0].pages)
        second.abort(order.id)
        first.release(handle)
        next_job = job(tuple(range(60, 60 + 6 * PAGE)))
        next_order = order_of(next_job, digests)
        next_handle = await handed(first, next_order)
        listener = Listener()
        assert await second.decode(next_order, listener.hear, next_handle) is None
        await steps(second, 2)
        assert taken & set(second.core.engine.scheduler.arriving[0].pages)
        await listener.ended.wait()
        (alone,) = serve(make_engine(modules, tokenizer), [next_job])
        assert tuple(said.sampled.token for said in listener.said) == alone.ids

    run_virtual(story())


def test_the_same_name_with_other_weights_finds_nothing_of_the_old_ones(
    modules: Modules, tokenizer: Tokenizer
) -> None:
    async def story() -> None:
        first, second = workers(modules, tokenizer)
        old = order_of(job(), digests_of(first, second))
        old_handle = await handed(first, old)
        other = replace(modules["b"], name="base", weights="base", digest="digest of another base")
        engine = first.core.engine
        engine.unload(["base"])
        engine.load({"base": other})
        failed = await first.prefill(msgspec.structs.replace(old, id="again"))
        assert isinstance(failed, Failed) and failed.code == "module_missing"
        new = order_of(job(), digests_of(first, second))
        refused = await second.decode(new, Listener().hear, old_handle)
        assert refused is not None and refused.code == "pages_gone", "pages of the weights that were"
        fresh = await first.prefill(msgspec.structs.replace(new, id="fresh"))
        assert isinstance(fresh, Handed) and fresh.spent.cached == 0
        told = await answered(new, second, first)
        (alone,) = serve(make_engine({"base": other, "a": modules["a"]}, tokenizer), [job()])
        assert told.ids == alone.ids

    run_virtual(story())


# ---- what does not fit, and what has no room


def test_pages_of_a_worker_that_does_not_fit_are_refused(modules: Modules, tokenizer: Tokenizer) -> None:
    async def story() -> None:
        first, second = workers(modules, tokenizer)
        assert (await first.describe()).fit == (await second.describe()).fit
        order = order_of(job(), digests_of(first, second))
        handle = await handed(first, order)
        for wrong, code in (
            (msgspec.structs.replace(handle, fit="another tokenizer"), "misfit"),
            (msgspec.structs.replace(handle, content="another prompt"), "pages_gone"),
            (msgspec.structs.replace(handle, tokens=handle.tokens - 1), "pages_gone"),
            (msgspec.structs.replace(handle, pages=handle.pages[:-1]), "pages_gone"),
            (msgspec.structs.replace(handle, digests=handle.digests[:-1]), "pages_gone"),
            (msgspec.structs.replace(handle, incarnation="another"), "pages_gone"),
            (msgspec.structs.replace(handle, store="heliostat-nobody"), "pages_gone"),
        ):
            failed = await second.decode(order, Listener().hear, wrong)
            assert failed is not None and failed.code == code, failed
        first.release(msgspec.structs.replace(handle, incarnation="another"))
        await steps(first, 1)
        assert first.core.lending.out, "a handle of another life releases nothing"
        first.release(handle)
        await steps(first, 1)
        await assert_empty(first, second)

    run_virtual(story())


def test_a_worker_without_the_prompts_writer_never_takes_another(
    modules: Modules, tokenizer: Tokenizer
) -> None:
    async def story() -> None:
        first, second = workers(modules, tokenizer)
        order = order_of(job(), digests_of(first, second))
        failed = await second.decode(order, Listener().hear)
        assert failed is not None and (failed.code, failed.retry) == ("module_missing", True)
        assert "'base'" in failed.reason
        refused = await first.decode(order, Listener().hear)
        assert refused is not None and refused.code == "module_missing"
        one = order_of(job((7,)), digests_of(first, second))
        told = await answered(one, second)
        assert len(told.ids) == 6, "of a prompt of one token it writes nothing"
        await assert_empty(first, second)

    run_virtual(story())


def test_no_more_handed_requests_wait_than_there_is_credit_for(
    modules: Modules, tokenizer: Tokenizer
) -> None:
    async def story() -> None:
        first, second = workers(modules, tokenizer, credit=2)
        digests = digests_of(first, second)
        orders = [order_of(job(PROMPT[: 9 + n]), digests) for n in range(3)]
        handles = [await handed(first, order) for order in orders]
        listeners = [Listener() for _ in orders]
        second.core.engine.scheduler.max_running = 0
        for order, handle, listener in zip(orders[:2], handles, listeners, strict=False):
            assert await second.decode(order, listener.hear, handle) is None
        failed = await second.decode(orders[2], listeners[2].hear, handles[2])
        assert failed is not None and (failed.status, failed.code, failed.retry) == (429, "busy", True)
        assert (await second.stats()).arriving == 2
        second.core.engine.scheduler.max_running = 64
        second.core.engine.stalled = False
        second.abort("nobody")  # wakes it
        for listener in listeners[:2]:
            await listener.ended.wait()
        assert await second.decode(orders[2], listeners[2].hear, handles[2]) is None
        await listeners[2].ended.wait()
        for handle in handles:
            first.release(handle)
        await steps(first, 1)
        await assert_empty(first, second)

    run_virtual(story())


def test_a_deadline_ends_an_order_on_either_side(modules: Modules, tokenizer: Tokenizer) -> None:
    async def story() -> None:
        first, second = workers(modules, tokenizer)
        digests = digests_of(first, second)
        order = order_of(job(max_tokens=60), digests, seconds=0.2)
        handle = await handed(first, order)
        first.core.engine.scheduler.max_running = 0
        stuck = await first.prefill(order_of(job(), digests, seconds=0.2))
        assert isinstance(stuck, Failed) and (stuck.status, stuck.code, stuck.retry) == (
            503,
            "deadline",
            False,
        )
        listener = Listener()
        assert await second.decode(order, listener.hear, handle) is None
        began = asyncio.get_running_loop().time()
        await listener.ended.wait()
        assert listener.failed is not None and listener.failed.code == "deadline" and listener.said
        assert asyncio.get_running_loop().time() - began == pytest.approx(0.2, abs=0.02)
        first.release(handle)
        await steps(first, 1)
        await assert_empty(first, second)

    run_virtual(story())


def test_a_drained_worker_takes_nothing_in_and_waits_for_what_it_lent(
    modules: Modules, tokenizer: Tokenizer
) -> None:
    async def story() -> None:
        first, second = workers(modules, tokenizer)
        digests = digests_of(first, second)
        order = order_of(job(), digests)
        handle = await handed(first, order)
        draining = asyncio.ensure_future(first.drain())
        await asyncio.sleep(0.1)
        assert not draining.done() and (await first.describe()).draining
        failed = await first.prefill(order_of(job(), digests))
        assert isinstance(failed, Failed) and (failed.code, failed.retry) == ("draining", True)
        listener = Listener()
        assert await second.decode(order, listener.hear, handle) is None
        await listener.ended.wait()
        first.release(handle)
        await draining

    run_virtual(story())


def test_who_loses_its_pages_goes_on_elsewhere_from_what_it_said(
    modules: Modules, tokenizer: Tokenizer
) -> None:
    """More answers than the decode worker's pages hold: some are lost, prefilled again, and end as they must."""
    jobs = [job(tuple(range(n, n + 2 * PAGE + n % 3)), max_tokens=20) for n in range(5, 13)]

    async def story() -> None:
        first = make_worker({"base": modules["base"]}, tokenizer, name="prefill")
        second = make_worker({"a": modules["a"]}, tokenizer, name="decode", pages=20)
        digests = digests_of(first, second)
        told = await asyncio.gather(
            *(answered(order_of(each, digests), second, first, tries=100) for each in jobs)
        )
        assert "pages_lost" in {code for each in told for code in each.failures}
        for each, alone in zip(told, serve(make_engine(modules, tokenizer), jobs), strict=True):
            assert each.ids == alone.ids
        assert second.core.engine.runner.ran.rows.keys() == {"a"}
        await assert_empty(first, second)

    run_virtual(story())


def test_an_engine_that_breaks_fails_all_and_takes_nothing_more(
    modules: Modules, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        worker = make_worker(modules, tokenizer)
        order = order_of(job(max_tokens=60), digests_of(worker))
        listener = Listener()
        assert await worker.decode(order, listener.hear) is None
        while not listener.said:
            await steps(worker, 1)

        def broken() -> None:
            raise RuntimeError("out of luck")

        monkeypatch.setattr(worker.core.engine, "step", broken)
        await listener.ended.wait()
        assert listener.failed is not None
        assert (listener.failed.code, listener.failed.retry) == ("engine_failed", True)
        assert "luck" not in listener.failed.reason and worker.failure
        refused = await worker.decode(order_of(job(), digests_of(worker)), Listener().hear)
        assert refused is not None and refused.code == "engine_failed"

    run_virtual(story())


def test_chance_of_prompts_around_short_leases_and_small_pools_never_gives_a_wrong_answer(
    modules: Modules, tokenizer: Tokenizer
) -> None:
    dice = random.Random(5)
    jobs = [
        job(tuple(dice.choices(range(5, 9), k=dice.randint(1, 20))), max_tokens=dice.randint(1, 6))
        for _ in range(40)
    ]

    async def story() -> None:
        first, second = workers(modules, tokenizer, pages=9, lease=0.05)
        digests = digests_of(first, second)

        async def one(each: Job) -> tuple[int, ...]:
            await asyncio.sleep(dice.uniform(0, 0.3))
            return (await answered(order_of(each, digests), second, first, tries=3000)).ids

        found = await asyncio.gather(*map(one, jobs))
        for each, ids in zip(jobs, found, strict=True):
            assert serve(make_engine(modules, tokenizer), [each])[0].ids == ids
        await asyncio.sleep(1)
        await assert_empty(first, second)

    run_virtual(story())


def test_a_listener_that_fails_silences_no_other(modules: Modules, tokenizer: Tokenizer) -> None:
    async def story() -> None:
        worker = make_worker(modules, tokenizer)
        seen: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, facts: seen.append(facts["exception"]))
        digests, fine = digests_of(worker), Listener()

        def broken(event: Said | Failed) -> None:
            raise RuntimeError("a bug")

        assert await worker.decode(order_of(job(), digests), broken) is None
        assert await worker.decode(order_of(job(), digests), fine.hear) is None
        await fine.ended.wait()
        assert len(fine.said) == 6 and len(seen) == 6
        await assert_empty(worker)

    run_virtual(story())
