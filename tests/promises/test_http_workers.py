"""The dispatcher over servers that are asked over HTTP: the same answers as one engine's, whatever breaks; nothing hangs."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from heliostat.build import Loaded
from heliostat.engine.request import Sampling
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.dispatch import Dispatcher
from heliostat.serve.metrics import Metrics
from heliostat.serve.protocol import Failed, Handed, Handle, Order
from heliostat.serve.trouble import Trouble
from tests.promises.crews import Listener, assert_empty, order_of
from tests.promises.doubles import Double
from tests.promises.test_dispatching import compare, told
from tests.promises.toys import PAGE, ROWS, Exactness, Job, make_engine, serve

Toys = dict[str, Loaded]
PLAYED = {
    "own prompt": ROWS["sun-a"],
    "own prompt, adapter": ROWS["sun-la"],
    "own answer": ROWS["prefillshare-a"],
    "own answer, adapter": ROWS["prefillshare-la"],
    "own voice": ROWS["icarus-la"],
    "all own": ROWS["independent-a"],
    "two of their own": Row("a", "b", "b", "b"),
    "two of their own, first": Row("a", "b", "b", "a"),
}
"""Rows that vLLM can play: full modules, adapters that write, adapters that only speak."""
PLACES: Mapping[str, tuple[str, Sequence[str], bool]] = {
    "p-base": ("prefill", ("base", "la"), False),
    "p-a": ("prefill", ("a",), False),
    "d-base": ("decode", ("base",), False),
    "d-adapters": ("decode", ("base", "la"), False),
    "d-voices": ("decode", ("base", "la"), True),
    "d-a": ("decode", ("a",), False),
    "d-b": ("decode", ("b",), False),
}


@dataclass
class House:
    """Servers, and a dispatcher that knows them."""

    dispatcher: Dispatcher
    doubles: dict[str, Double] = field(default_factory=dict)
    workers: dict[str, Any] = field(default_factory=dict)

    async def join(self, double: Double) -> None:
        """It is there, and is what it should be."""
        worker = double.worker()
        worker.start()
        self.doubles[double.name], self.workers[double.name] = double, worker
        self.dispatcher.join(worker, await worker.describe())

    async def dies(self, name: str) -> None:
        """A server is killed, and the supervisor sees it."""
        await self.doubles.pop(name).dies()
        self.workers[name].lost("the server ended")
        self.dispatcher.leave(name)
        await self.workers.pop(name).close()


@asynccontextmanager
async def house(toys: Toys, tokenizer: Tokenizer, *names: str, **options: Any) -> AsyncIterator[House]:
    """So many of PLACES."""
    made = House(Dispatcher(Metrics(), **{"max_waiting": 1000, **options}))
    try:
        for name in names or PLACES:
            role, names_, two = PLACES[name.partition("/")[0]]
            hosted = {module: toys[module] for module in names_}
            double = Double(name, hosted, tokenizer, (role,), two)  # type: ignore[arg-type]
            await made.join(await double.start())
        yield made
    finally:
        await made.dispatcher.stop()
        for worker in made.workers.values():
            await worker.close()
        for double in made.doubles.values():
            await double.stop()


def within(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    async def timed() -> None:
        async with asyncio.timeout(seconds):
            await work()

    asyncio.run(timed())


def orders_of(toys: Toys, jobs: Sequence[Job]) -> list[Order]:
    return [order_of(job, {name: module.digest for name, module in toys.items()}) for job in jobs]


def jobs_of(count: int = 16, *, tokens: int = 9, rows: Mapping[str, Row] = PLAYED) -> list[Job]:
    """Prompts around borders of pages, of all rows in turns."""
    jobs = []
    for number in range(count):
        row = list(rows.values())[number % len(rows)]
        prompt = tuple(
            5 + (7 * number + 3 * place) % 240 for place in range(2 * PAGE - 2 + number % (2 * PAGE))
        )
        jobs.append(Job(row, prompt, Sampling(max_tokens=1 + number % tokens, ignore_eos=True, logprobs=2)))
    return jobs


async def all_of(dispatcher: Dispatcher, orders: Sequence[Order]) -> list[list[int]]:
    return list(await asyncio.gather(*(told(dispatcher.ask([order])) for order in orders)))


def test_every_row_answers_as_one_engine_does(
    modules: Toys, tokenizer: Tokenizer, exactness: Exactness
) -> None:
    jobs = jobs_of(32)
    alone = serve(make_engine(modules, tokenizer), jobs)

    async def story() -> None:
        async with house(modules, tokenizer) as made:
            found = await all_of(made.dispatcher, orders_of(modules, jobs))
            compare(found, alone, exactness)
            for name in ("p-base", "p-a", "d-base", "d-voices", "d-b"):
                assert made.doubles[name].begun, name

    within(240, story)


async def until(found: Callable[[], bool]) -> None:
    while not found():
        await asyncio.sleep(0.002)


async def spoken(double: Double, count: int) -> None:
    await until(lambda: double.said > count)


def test_a_prefill_server_that_is_killed_costs_time_only(
    modules: Toys, tokenizer: Tokenizer, exactness: Exactness
) -> None:
    jobs = jobs_of(12, rows={"own prompt": PLAYED["own prompt"]})
    alone = serve(make_engine(modules, tokenizer), jobs)

    async def story() -> None:
        async with house(modules, tokenizer, "p-a/0", "p-a/1", "d-base") as made:
            made.doubles["p-a/0"].faults.pause = 0.05
            asked = asyncio.create_task(all_of(made.dispatcher, orders_of(modules, jobs)))
            await until(lambda: made.doubles["p-a/0"].begun > 2)
            await made.dies("p-a/0")
            compare(await asked, alone, exactness)

    within(240, story)


def test_a_decode_server_that_is_killed_while_it_speaks_is_gone_on_for(
    modules: Toys, tokenizer: Tokenizer, exactness: Exactness
) -> None:
    rows = {name: PLAYED[name] for name in ("own prompt", "all own")}
    jobs = [
        Job(job.row, job.prompt, Sampling(max_tokens=12, ignore_eos=True, logprobs=2))
        for job in jobs_of(8, rows=rows)
    ]
    alone = serve(make_engine(modules, tokenizer), jobs)

    async def story() -> None:
        names = ("p-a", "d-base/0", "d-base/1", "d-a/0", "d-a/1")
        async with house(modules, tokenizer, *names) as made:
            for double in made.doubles.values():
                double.faults.pause = 0.01
            asked = asyncio.create_task(all_of(made.dispatcher, orders_of(modules, jobs)))
            for name in ("d-base/0", "d-a/0"):
                await spoken(made.doubles[name], 4)
                await made.dies(name)
            compare(await asked, alone, exactness)

    within(240, story)


def test_streams_that_break_are_gone_on_with(
    modules: Toys, tokenizer: Tokenizer, exactness: Exactness
) -> None:
    jobs = jobs_of(12)
    alone = serve(make_engine(modules, tokenizer), jobs)

    async def story() -> None:
        async with house(modules, tokenizer) as made:
            for name, double in made.doubles.items():
                if name.startswith("d"):
                    double.faults.cut = 2
            compare(await all_of(made.dispatcher, orders_of(modules, jobs)), alone, exactness)

    within(240, story)


def test_what_was_not_transferred_is_never_computed_by_another_module(
    modules: Toys, tokenizer: Tokenizer
) -> None:
    order = orders_of(modules, jobs_of(6, rows={"own prompt": PLAYED["own prompt"]}))[5]

    async def story() -> None:
        async with house(modules, tokenizer, "p-a", "d-base") as made:
            made.doubles["d-base"].faults.forget = True
            with pytest.raises(Trouble) as failed:
                await told(made.dispatcher.ask([order]))
            assert failed.value.code == "pages_gone" and "could not be loaded" in str(failed.value)
            assert not made.doubles["d-base"].said
            made.doubles["d-base"].faults.forget = False
            assert len(await told(made.dispatcher.ask([order]))) == order.sampling.max_tokens

    within(240, story)


def test_an_abort_reaches_both_sides(modules: Toys, tokenizer: Tokenizer) -> None:
    wish = Sampling(max_tokens=60, ignore_eos=True)
    order = orders_of(modules, [Job(PLAYED["own prompt"], tuple(range(5, 25)), wish)])[0]

    async def story() -> None:
        async with house(modules, tokenizer, "p-a", "d-base") as made:
            double = made.doubles["d-base"]
            double.faults.pause = 0.01
            asked = made.dispatcher.ask([order])
            await asked.begun()
            await until(lambda: double.said > 2)
            made.dispatcher.abort(asked)
            await until(lambda: double.aborted == 1)
            assert double.said < 60
            await until(lambda: not made.dispatcher.router.outstanding("d-base")[0])
            await until(lambda: not double.inside.core.engine.unfinished)

    within(240, story)


@pytest.mark.parametrize("side", ["p-a", "d-base"])
def test_an_abort_before_anything_is_said_leaves_nothing_on_either_side(
    modules: Toys, tokenizer: Tokenizer, side: str
) -> None:
    """While the prompt is read, or while who decodes has not begun: what was written is held no longer than that."""
    wish = Sampling(max_tokens=60, ignore_eos=True)
    order = orders_of(modules, [Job(PLAYED["own prompt"], tuple(range(5, 25)), wish)])[0]

    async def story() -> None:
        async with house(modules, tokenizer, "p-a", "d-base") as made:
            made.doubles[side].faults.pause = 3600
            writer, released = made.workers["p-a"], list[Handle]()
            let_go = writer.release

            def release(handle: Handle) -> None:
                released.append(handle)
                let_go(handle)

            writer.release = release
            asked = made.dispatcher.ask([order])
            await until(lambda: made.doubles[side].begun == 1)
            assert bool(made.doubles["p-a"].inside.core.lending.out) == (side == "d-base")
            made.dispatcher.abort(asked)
            await until(lambda: not made.dispatcher.router.outstanding("d-base")[0])
            assert len(released) == (side == "d-base"), "its lease is for words that are lost"
            for name, double in made.doubles.items():
                await double.settled()
                assert not (await made.workers[name].stats()).running

    within(240, story)


def test_a_fault_of_ours_ends_a_request_and_is_told(
    modules: Toys, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is raised where nobody waits: the request goes on elsewhere, or ends with the reason."""
    order = orders_of(modules, [Job(PLAYED["all own"], tuple(range(5, 25)), Sampling(max_tokens=3))])[0]

    def broken(*_: Any, **__: Any) -> Any:
        raise KeyError("none of those that are expected")

    async def story() -> None:
        async with house(modules, tokenizer, "d-a") as made:
            monkeypatch.setattr(made.workers["d-a"]._line, "stream", broken)
            with pytest.raises(Trouble, match="KeyError"):
                await told(made.dispatcher.ask([order]))
            assert not made.dispatcher.unfinished and not made.workers["d-a"]._calls

    within(240, story)
    assert "KeyError" in caplog.text, "whoever runs it finds where"


def test_a_deadline_ends_a_slow_one_at_both_sides(modules: Toys, tokenizer: Tokenizer) -> None:
    wish = Sampling(max_tokens=60, ignore_eos=True)
    order = orders_of(modules, [Job(PLAYED["own prompt"], tuple(range(5, 25)), wish)])[0]

    async def story() -> None:
        async with house(modules, tokenizer, "p-a", "d-base", deadline=0.5) as made:
            double = made.doubles["d-base"]
            double.faults.pause = 0.05
            began = asyncio.get_running_loop().time()
            with pytest.raises(Trouble) as failed:
                await told(made.dispatcher.ask([order]))
            assert failed.value.code == "deadline"
            assert asyncio.get_running_loop().time() - began < 5
            await until(lambda: double.aborted == 1)

    within(240, story)


def test_a_server_that_falls_silent_is_lost(modules: Toys, tokenizer: Tokenizer) -> None:
    """Its connections stand, and nothing comes: what runs there is ended, and fails with a reason."""
    order = orders_of(
        modules, [Job(PLAYED["all own"], tuple(range(5, 25)), Sampling(max_tokens=60, ignore_eos=True))]
    )[0]

    async def story() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async with house(modules, tokenizer, "d-a") as made:
            worker, double = made.doubles["d-a"].worker(patience=0.3, beat=0.05), made.doubles["d-a"]
            worker.start()
            await worker.describe()
            listener = Listener()
            double.faults.pause = 0.05
            assert await worker.decode(order, listener.hear) is None
            await until(lambda: double.said > 2)
            double.faults.pause = 3600
            deaf = await asyncio.start_server(silent, "127.0.0.1", 0)
            worker._line._url = (
                f"http://127.0.0.1:{deaf.sockets[0].getsockname()[1]}"  # as if the way there were cut
            )
            await listener.ended.wait()
            assert listener.failed is not None and listener.failed.code == "worker_lost"
            assert "no word" in listener.failed.reason and worker.gone
            await worker.close()
            deaf.close()
            await deaf.wait_closed()

    within(240, story)


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"page_size": 32}, ("page size 4", "says 32")),
        ({"dtype": "bfloat16"}, ("dtype 'float32'", "'bfloat16'")),
        ({"roles": ("prefill",)}, ("role 'decode'", "'prefill'")),
        ({"modules": {"base": "f" * 64}}, ("digest of b", "ffffffffffff")),
        ({"modules": {"other": "f" * 64}}, ("'other'", "it hosts base")),
        ({"fit": "another"}, ("fit of the t", "another")),
    ],
)
def test_a_server_that_is_not_what_the_cluster_says_is_refused_with_both_values(
    modules: Toys, tokenizer: Tokenizer, expected: dict[str, Any], words: tuple[str, str]
) -> None:
    async def story() -> None:
        async with house(modules, tokenizer, "d-base") as made:
            worker = made.doubles["d-base"].worker(expected=expected)
            with pytest.raises(Refused) as refused:
                await worker.describe()
            assert all(word in str(refused.value) for word in words), refused.value
            await worker.close()

    within(240, story)


def test_two_that_write_otherwise_never_read_each_other(modules: Toys, tokenizer: Tokenizer) -> None:
    """A handle of another writer is refused by the server itself, too."""
    one, other = orders_of(
        modules, [Job(PLAYED[name], tuple(range(5, 25))) for name in ("own prompt", "own prompt, adapter")]
    )

    async def story() -> None:
        async with house(modules, tokenizer, "p-a", "p-base", "d-base") as made:
            handed = await made.workers["p-a"].prefill(one)
            assert isinstance(handed, Handed) and handed.handle is not None
            failed = await made.workers["d-base"].decode(other, Listener().hear, handed.handle)
            assert isinstance(failed, Failed) and failed.code == "pages_gone"

    within(240, story)


@pytest.mark.parametrize("wish", [{"presence_penalty": 1.0}, {"frequency_penalty": 0.5}])
def test_what_cannot_be_kept_to_is_refused_by_name(
    modules: Toys, tokenizer: Tokenizer, wish: dict[str, float]
) -> None:
    own, all_ = PLAYED["own prompt"], PLAYED["all own"]
    sampling = Sampling(max_tokens=4, ignore_eos=True, **wish)  # type: ignore[arg-type]
    first, plain = orders_of(modules, [Job(row, tuple(range(5, 25)), sampling) for row in (own, all_)])

    async def story() -> None:
        async with house(modules, tokenizer, "p-a", "d-base") as made:
            with pytest.raises(Refused, match="embedded engine"):
                await told(made.dispatcher.ask([first]))
        async with house(modules, tokenizer, "d-a") as made:  # one server does all of it
            alone = serve(make_engine(modules, tokenizer), [Job(all_, plain.prompt, sampling)])
            assert await told(made.dispatcher.ask([plain])) == list(alone[0].ids)

    within(240, story)


def test_stop_strings_and_text_are_as_the_engine_makes_them(modules: Toys, tokenizer: Tokenizer) -> None:
    prompt = tuple(range(5, 25))
    long = Sampling(max_tokens=40, ignore_eos=True)
    (whole,) = serve(make_engine(modules, tokenizer), [Job(PLAYED["own prompt"], prompt, long)])
    text = tokenizer.decode(whole.ids)
    stop = text[10:13]
    sampling = Sampling(max_tokens=40, ignore_eos=True, stop=(stop,))
    (order,) = orders_of(modules, [Job(PLAYED["own prompt"], prompt, sampling)])

    async def story() -> None:
        async with house(modules, tokenizer, "p-a", "d-base") as made:
            said = [said async for _, said in made.dispatcher.ask([order]).pieces()]
            assert "".join(one.text for one in said) == text[: text.index(stop)]
            assert said[-1].finish == "stop"

    within(240, story)


def test_nothing_is_left_behind(modules: Toys, tokenizer: Tokenizer) -> None:
    async def story() -> None:
        async with house(modules, tokenizer) as made:
            await all_of(made.dispatcher, orders_of(modules, jobs_of(16)))
            for name, worker in made.workers.items():
                assert made.dispatcher.router.outstanding(name) == (0, 0)
                stats = await worker.stats()
                assert not stats.running, name
                await made.doubles[name].settled()
                await assert_empty(made.doubles[name].inside)

    within(240, story)
