"""A dispatcher over workers that are made of a few lines: what each kind of word, or none, makes of a request."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from msgspec.structs import replace

from heliostat.clock import run_virtual
from heliostat.engine.request import Sampling
from heliostat.family import Row
from heliostat.serve.dispatch import TRIES, Dispatcher
from heliostat.serve.dispatch_asked import Asked, Open
from heliostat.serve.dispatch_queue import Queue
from heliostat.serve.metrics import Metrics
from heliostat.serve.protocol import Described, Failed, Hear, Order, Said, Sampled
from heliostat.serve.router import Route, Router, Wish
from heliostat.serve.trouble import Trouble
from tests.unit.serve.test_router import offer

ROW = Row("base", "base", "base", "base")
Answer = Callable[[Order, Hear], Failed | None]


class Puppet:
    """Does with an order what the test says."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.orders, self.aborted = answer, list[Order](), list[str]()

    async def decode(self, order: Order, hear: Hear, handle: Any = None) -> Failed | None:
        self.orders.append(order)
        return self.answer(order, hear)

    def abort(self, order: str) -> None:
        self.aborted.append(order)

    async def load(self, modules: Any) -> Described:
        raise ConnectionError("no word from the worker")


def order(tokens: int = 3) -> Order:
    digests = {"base": "digest of base"}
    return Order(id="o", row=ROW, digests=digests, prompt=(1, 2), sampling=Sampling(max_tokens=tokens))


def says(order: Order, hear: Hear, *numbers: int, last: int = 2) -> None:
    for number in numbers:
        finish = "length" if number == last else None
        said = Said(order.id, number, Sampled(10 + number), "x", finish)  # type: ignore[arg-type]
        asyncio.get_running_loop().call_soon(hear, said)


async def told(dispatcher: Dispatcher) -> list[int]:
    return [said.sampled.token async for _, said in dispatcher.ask([order()]).pieces()]


def over(
    answer: Answer, work: Callable[[Dispatcher, Puppet], Coroutine[Any, Any, None]], **options: Any
) -> None:
    async def whole() -> None:
        dispatcher, puppet = Dispatcher(Metrics(), **options), Puppet(answer)
        described: Described = offer("w", "base")
        dispatcher.join(puppet, described)  # type: ignore[arg-type]
        await work(dispatcher, puppet)
        await asyncio.sleep(0.1)
        assert dispatcher.unfinished == 0 and dispatcher.router.outstanding("w") == (0, 0)

    run_virtual(whole())


def test_who_says_nothing_is_left_at_the_deadline() -> None:
    async def work(dispatcher: Dispatcher, puppet: Puppet) -> None:
        with pytest.raises(Trouble, match="deadline of 4 s"):
            await told(dispatcher)
        assert asyncio.get_running_loop().time() == pytest.approx(4.0)
        await asyncio.sleep(0)
        assert puppet.aborted == [puppet.orders[0].id] and puppet.orders[0].seconds == 4.0

    over(lambda order, hear: None, work, deadline=4.0)


def test_a_token_that_is_missing_is_asked_for_again_and_no_token_is_told_twice() -> None:
    def answer(order: Order, hear: Hear) -> None:
        says(order, hear, *((0, 2) if not order.answer else (1, 2)))

    async def work(dispatcher: Dispatcher, puppet: Puppet) -> None:
        assert await told(dispatcher) == [10, 11, 12]
        first, second = puppet.orders
        assert second.answer == (10,) and second.id != first.id and first.id in puppet.aborted

    over(answer, work)


@pytest.mark.parametrize("retry", [True, False])
def test_a_failure_is_tried_again_only_where_that_makes_sense_and_not_for_ever(retry: bool) -> None:
    def answer(order: Order, hear: Hear) -> Failed:
        return Failed(order.id, 503, "busy", "hands full", retry)

    async def work(dispatcher: Dispatcher, puppet: Puppet) -> None:
        with pytest.raises(Trouble, match="hands full"):
            await told(dispatcher)
        assert len(puppet.orders) == (TRIES if retry else 1)

    over(answer, work)


def test_where_nobody_can_answer_any_more_the_server_says_so() -> None:
    def answer(order: Order, hear: Hear) -> Failed:
        return Failed(order.id, 503, "engine_failed", "the engine failed; start it again", True)

    async def work(dispatcher: Dispatcher, puppet: Puppet) -> None:
        with pytest.raises(Trouble, match="the engine failed") as trouble:
            await told(dispatcher)
        assert trouble.value.code == "engine_failed" and dispatcher.failure and not dispatcher.workers
        with pytest.raises(Trouble, match="the engine failed"):
            dispatcher.ask([order()])

    over(answer, work)


def test_a_fault_of_ours_is_told_and_nobody_hangs() -> None:
    def answer(order: Order, hear: Hear) -> None:
        raise KeyError("a secret")

    async def work(dispatcher: Dispatcher, puppet: Puppet) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        asked = dispatcher.ask([order()])
        with pytest.raises(Trouble) as trouble:
            await asked.begun()
        assert trouble.value.status == 500 and "secret" not in str(trouble.value)
        await asyncio.gather(*(one.task for one in asked.requests if one.task), return_exceptions=True)

    over(answer, work)


def test_without_a_deadline_patience_has_an_end() -> None:
    async def work(dispatcher: Dispatcher, puppet: Puppet) -> None:
        dispatcher.leave("w")
        with pytest.raises(Trouble, match="answers with 'base'; waited 7 s") as trouble:
            await told(dispatcher)
        assert trouble.value.status == 503 and "Retry-After" in trouble.value.headers

    over(lambda order, hear: None, work, patience=7.0)


def test_what_workers_take_is_known_while_they_are_away() -> None:
    async def work(dispatcher: Dispatcher, puppet: Puppet) -> None:
        known = dispatcher.max_length, dispatcher.page_size
        dispatcher.leave("w")
        assert (dispatcher.max_length, dispatcher.page_size) == known == (1000, 4)

    over(lambda order, hear: None, work)


def test_patience_is_for_where_nobody_is_and_not_for_full_hands() -> None:
    async def work() -> None:
        router, loop = Router(), asyncio.get_running_loop()
        queue = Queue(router, patience=7.0)
        router.join(offer("p", "base", roles=["prefill"]))
        router.join(offer("d", "base", roles=["decode"], credit=1))
        wishes = [Wish(replace(order(), id=f"o{n}", prompt=(1, 2, 3)), 4) for n in range(4)]
        asked = Asked()

        def placed(n: int) -> asyncio.Task[Route]:
            return loop.create_task(queue.place(Open(wishes[n].order, asked, n, 0.0, None), wishes[n], ()))

        await placed(0)
        first, second = placed(1), placed(2)
        await asyncio.sleep(100)
        assert not first.done() and not second.done() and len(queue) == 2
        router.ended("o0")
        queue.changed()
        late = placed(3)  # the head of its line was found, and is still in it
        await first
        for n, task in ((1, second), (2, late)):
            router.ended(f"o{n}")
            queue.changed()
            await asyncio.wait_for(task, 1.0)
        assert not len(queue)

    run_virtual(work())


def test_a_place_that_was_found_too_late_goes_to_the_next() -> None:
    async def work() -> None:
        router, loop = Router(), asyncio.get_running_loop()
        queue = Queue(router, patience=7.0)
        router.join(offer("p", "base", roles=["prefill"]))
        router.join(offer("d", "base", roles=["decode"], credit=1))
        wishes = [Wish(replace(order(), id=f"o{n}", prompt=(1, 2, 3)), 4) for n in range(3)]
        asked = Asked()
        first, second, third = (
            loop.create_task(queue.place(Open(wish.order, asked, n, 0.0, None), wish, ()))
            for n, wish in enumerate(wishes)
        )
        await first
        router.ended("o0")
        queue.changed()  # finds the second
        second.cancel()
        await asyncio.wait_for(third, 1.0)
        router.ended("o2")
        assert router.outstanding("d") == (0, 0)

    run_virtual(work())


def test_a_worker_that_is_away_or_lost_while_it_loads_is_no_fault_of_who_asks() -> None:
    async def work(dispatcher: Dispatcher, puppet: Puppet) -> None:
        for name in ("w", "away"):
            with pytest.raises(Trouble, match="try again") as trouble:
                await dispatcher.load({name: {"own": "a digest"}})
            assert (trouble.value.status, trouble.value.code) == (503, "worker_lost")

    over(lambda order, hear: None, work)
