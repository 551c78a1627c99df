"""The line between server and worker: what is damaged is dropped, what is missing is noticed, what is late is ignored."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heliostat.clock import run_virtual
from heliostat.engine.request import Sampling
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.serve.link import (
    GRACE,
    PATIENCE,
    Abort,
    Ask,
    Bye,
    Describe,
    Ends,
    Opener,
    Ping,
    Prefill,
    Reply,
    Told,
    ToServer,
    ToWorker,
    Wire,
    sealed,
)
from heliostat.serve.link_client import RemoteWorker
from heliostat.serve.link_server import Servant
from heliostat.serve.log import Log
from heliostat.serve.protocol import (
    Described,
    Failed,
    Handed,
    Handle,
    Hear,
    Order,
    Said,
    Sampled,
    Spent,
    Stats,
    no,
)

ROW = Row("base", "a", "a", "a")
HANDLE = Handle(
    order="o",
    worker="w",
    incarnation="i",
    fit="f",
    content="c",
    store="s",
    tokens=3,
    pages=(1,),
    generations=(2,),
    digests=(b"d",),
    lease=30.0,
)


def order(name: str = "o", **more: Any) -> Order:
    return Order(id=name, row=ROW, digests={}, prompt=(1, 2, 3), sampling=Sampling(), **more)


def said(number: int, *, last: bool = False, name: str = "o") -> Said:
    return Said(name, number, Sampled(7 + number), f"t{number}", "stop" if last else None)


class Puppet:
    """A worker that says what a test wants it to."""

    def __init__(self) -> None:
        self.hears: dict[str, Hear] = {}
        self.prefills: dict[str, asyncio.Future[Handed | Failed]] = {}
        self.aborted: list[str] = []
        self.released: list[Handle] = []
        self.refuses: Failed | None = None
        self.takes_in = 0.0
        """Seconds until an order is taken in: its schema is read first."""

    async def describe(self) -> Described:
        return Described(
            worker="w",
            incarnation="i",
            modules={"base": "d"},
            roles=("prefill",),
            fit="f",
            page_size=4,
            dtype="float32",
            pages=3,
            page_bytes=8,
            max_length=9,
            max_running=2,
            credit=1,
            hands=True,
        )

    async def prefill(self, order: Order) -> Handed | Failed:
        self.prefills[order.id] = asyncio.get_running_loop().create_future()
        return await self.prefills[order.id]

    async def decode(self, order: Order, hear: Hear, handle: Handle | None = None) -> Failed | None:
        await asyncio.sleep(self.takes_in)
        self.hears[order.id] = hear
        return self.refuses

    def abort(self, order: str) -> None:
        self.aborted.append(order)
        self.hears.pop(order, None)
        if order in self.prefills and not self.prefills[order].done():
            self.prefills[order].set_result(no(order, "aborted", "it was aborted"))

    def release(self, handle: Handle) -> None:
        self.released.append(handle)

    async def stats(self) -> Stats:
        return Stats(leased=3)

    async def load(self, modules: Any) -> Described:
        raise Refused("there is no room")

    async def unload(self, modules: Any) -> Described:
        return await self.describe()

    async def drain(self) -> None:
        return None

    async def close(self) -> None:
        return None


class Sieve(Ends):
    """An end that lets a test hold frames back, change them or let them come twice."""

    def __init__(self) -> None:
        super().__init__()
        self.rule: Callable[[bytes], list[bytes]] = lambda frame: [frame]

    def send(self, frame: bytes) -> None:
        for each in self.rule(frame):
            super().send(each)


class Both:
    """A puppet and the other end of its line."""

    def __init__(self) -> None:
        there, here = Sieve.pair()
        assert isinstance(there, Sieve) and isinstance(here, Sieve)
        self.puppet, self.there, self.here = Puppet(), there, here
        self.servant = Servant(self.puppet, there, log=Log(None))
        self.remote = RemoteWorker(here, log=Log(None))
        self.servant.start()
        self.remote.start()
        self.heard: list[Said | Failed] = []

    def without(self, *kinds: type) -> Callable[[bytes], list[bytes]]:
        """A rule that loses these messages."""
        opener = Opener(ToServer | ToWorker, Log(None))
        return lambda frame: [] if isinstance(opener(frame), kinds) else [frame]

    async def decoding(self, **more: Any) -> None:
        """An order that is taken in."""
        assert await self.remote.decode(order(**more), self.heard.append) is None

    @property
    def numbers(self) -> list[int]:
        return [event.number for event in self.heard if isinstance(event, Said)]

    @property
    def failure(self) -> Failed | None:
        return next((event for event in self.heard if isinstance(event, Failed)), None)


def story(work: Callable[[Both], Any]) -> None:
    async def begin() -> None:
        await work(Both())

    run_virtual(begin())


# ---- frames


def test_frames_say_what_was_said_and_nothing_else_is_understood() -> None:
    opened = Opener(ToWorker, Log(None))
    for message in (Ask(3, Describe()), Ask(4, Prefill(order())), Abort("o"), Ping(2, (1, 2)), Bye()):
        frame = sealed(message)
        assert opened(frame) == message
        assert opened(frame[:-1]) is None and opened(frame[:3]) is None and opened(b"") is None
        for place in range(len(frame)):
            changed = bytearray(frame)
            changed[place] ^= 1 << (place % 8)
            assert opened(bytes(changed)) is None
    assert opened(sealed(Reply(1, Stats()))) is None, "a word of the other side"
    assert opened.dropped > 50


def test_calls_are_answered_and_refusals_raised() -> None:
    async def work(both: Both) -> None:
        assert (await both.remote.describe()).worker == "w"
        assert (await both.remote.stats()).leased == 3
        assert (await both.remote.unload(["x"])).worker == "w"
        await both.remote.drain()
        with pytest.raises(Refused, match="no room"):
            await both.remote.load({"a": "b"})

    story(work)


def test_a_call_that_no_frame_can_hold_is_not_waited_for() -> None:
    async def work(both: Both) -> None:
        with pytest.raises(OverflowError):
            await both.remote.prefill(order(answer=(2**70,)))
        assert not both.remote._asked

    story(work)


# ---- answers


def test_an_answer_is_heard_in_order_however_it_comes() -> None:
    async def work(both: Both) -> None:
        await both.decoding()
        for number in (1, 0, 0, 3, 2, 2):
            both.there.send(sealed(Told((said(number, last=number == 3),))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert both.numbers == [0, 1, 2, 3]
        both.there.send(sealed(Told((said(3, last=True),))))
        await asyncio.sleep(0.1)
        assert both.numbers == [0, 1, 2, 3], "nothing after the end"

    story(work)


def test_one_batch_is_one_frame() -> None:
    async def work(both: Both) -> None:
        for name in ("o", "p"):
            await both.decoding(name=name)
        frames: list[bytes] = []

        def noted(frame: bytes) -> list[bytes]:
            frames.append(frame)
            return [frame]

        both.there.rule = noted
        for name in ("o", "p"):
            both.puppet.hears[name](said(0, name=name))
        await asyncio.sleep(0.01)
        assert len(frames) == 1 and len(both.heard) == 2

    story(work)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_word_of_an_answer_is_noticed(lost: int) -> None:
    async def work(both: Both) -> None:
        await both.decoding()
        hear = both.puppet.hears["o"]
        for number in range(3):
            both.there.rule = (lambda frame: []) if number == lost else (lambda frame: [frame])
            hear(said(number, last=number == 2))
            await asyncio.sleep(0.001)
        both.there.rule = lambda frame: [frame]
        await asyncio.sleep(GRACE + 1.5)
        assert both.numbers == list(range(lost))
        assert both.failure is not None and (both.failure.code, both.failure.retry) == ("worker_lost", True)
        assert "o" in both.puppet.aborted

    story(work)


def test_an_order_goes_on_though_the_word_that_it_was_taken_in_is_lost() -> None:
    async def work(both: Both) -> None:
        both.there.rule = both.without(Reply)
        await both.decoding()
        both.puppet.hears["o"](said(0, last=True))
        await asyncio.sleep(0.01)
        assert both.numbers == [0]

    story(work)


@pytest.mark.parametrize("which", ["call", "answer"])
def test_a_lost_call_or_answer_fails_and_may_be_asked_again(which: str) -> None:
    async def work(both: Both) -> None:
        if which == "call":
            both.here.rule = both.without(Ask)
        else:
            both.there.rule = both.without(Reply)
        asking = asyncio.ensure_future(both.remote.prefill(order()))
        await asyncio.sleep(0.01)
        if which == "answer":
            both.puppet.prefills["o"].set_result(Handed("o", HANDLE, Spent()))
        failed = await asking
        assert isinstance(failed, Failed) and (failed.code, failed.retry) == ("worker_lost", True)
        assert asyncio.get_running_loop().time() < GRACE + 2
        await asyncio.sleep(0.01)
        assert both.puppet.aborted == ["o"], "what may still be done for it is ended"

    story(work)


def test_what_was_handed_over_too_late_is_released_but_never_because_it_came_twice() -> None:
    async def work(both: Both) -> None:
        asking = asyncio.ensure_future(both.remote.prefill(order()))
        await asyncio.sleep(0.01)
        both.there.rule = lambda frame: [frame, frame]
        both.puppet.prefills["o"].set_result(Handed("o", HANDLE, Spent()))
        assert isinstance(await asking, Handed)
        await asyncio.sleep(0.01)
        assert both.puppet.released == []
        both.there.rule = lambda frame: [frame]
        late = asyncio.ensure_future(both.remote.prefill(order("late")))
        await asyncio.sleep(0.01)
        late.cancel()
        both.here.rule = both.without(Abort, Ping)
        await asyncio.sleep(0.01)
        both.puppet.prefills["late"].set_result(Handed("late", HANDLE, Spent()))
        await asyncio.sleep(0.01)
        assert both.puppet.released == [HANDLE]

    story(work)


def test_a_call_that_comes_twice_is_made_once() -> None:
    async def work(both: Both) -> None:
        both.here.rule = lambda frame: [frame, frame]
        calls = []
        decode = both.puppet.decode

        async def counted(order: Order, hear: Hear, handle: Handle | None = None) -> Failed | None:
            calls.append(order.id)
            return await decode(order, hear, handle)

        both.puppet.decode = counted  # type: ignore[method-assign]
        await both.decoding()
        await asyncio.sleep(0.1)
        assert calls == ["o"]

    story(work)


def test_a_lost_abort_is_made_good_by_the_next_beat() -> None:
    async def work(both: Both) -> None:
        await both.decoding(name="o")
        await both.decoding(name="kept")
        both.here.rule = both.without(Abort)
        both.remote.abort("o")
        await asyncio.sleep(1.0)
        assert both.puppet.aborted == ["o"] and "kept" in both.puppet.hears

    story(work)


def test_an_old_beat_ends_nothing_that_was_asked_after_it() -> None:
    async def work(both: Both) -> None:
        await both.decoding()
        both.here.send(sealed(Ping(0, ())))
        await asyncio.sleep(0.01)
        assert both.puppet.aborted == []

    story(work)


def test_silence_fails_everything_and_words_are_taken_again_afterwards() -> None:
    async def work(both: Both) -> None:
        await both.decoding()
        both.there.rule = lambda frame: []
        asking = asyncio.ensure_future(both.remote.stats())
        await asyncio.sleep(PATIENCE + 2)
        assert both.failure is not None and both.failure.code == "worker_lost"
        assert both.remote.silent > PATIENCE
        with pytest.raises(ConnectionError, match="no word"):
            await asking
        both.there.rule = lambda frame: [frame]
        await asyncio.sleep(1)
        assert (await both.remote.stats()).leased == 3

    story(work)


def test_a_worker_that_is_known_to_be_dead_fails_all_at_once() -> None:
    async def work(both: Both) -> None:
        await both.decoding()
        asking = asyncio.ensure_future(both.remote.prefill(order("p")))
        await asyncio.sleep(0.01)
        both.remote.lost("ended by signal 9")
        assert both.failure is not None and "signal 9" in both.failure.reason
        failed = await asking
        assert isinstance(failed, Failed) and failed.retry
        with pytest.raises(ConnectionError):
            await both.remote.describe()

    story(work)


def test_a_refused_order_is_told_and_nothing_is_heard_of_it() -> None:
    async def work(both: Both) -> None:
        both.puppet.refuses = no("o", "module_missing", "not here")
        assert await both.remote.decode(order(), both.heard.append) == both.puppet.refuses
        assert both.heard == []

    story(work)


def test_over_a_real_socket(tmp_path: Path) -> None:
    async def work() -> None:
        puppet, path = Puppet(), tmp_path / "worker"
        servant = Servant(puppet, Wire(path, bind=True), log=Log(None))
        remote = RemoteWorker(Wire(path, bind=False), log=Log(None))
        servant.start()
        remote.start()
        assert (await remote.describe()).worker == "w"
        heard: list[Said | Failed] = []
        assert await remote.decode(order(), heard.append) is None
        puppet.hears["o"](said(0))
        puppet.hears["o"](said(1, last=True))
        while len(heard) < 2:
            await asyncio.sleep(0.001)
        await remote.close()
        await servant.dismissed.wait()
        servant.stop()

    async def soon() -> None:
        async with asyncio.timeout(30):
            await work()

    asyncio.run(soon())


def test_an_abort_that_comes_before_its_order_is_taken_in_ends_it_then() -> None:
    async def work(both: Both) -> None:
        both.puppet.takes_in = 0.5
        asking = asyncio.ensure_future(both.decoding())
        await asyncio.sleep(0.1)
        asking.cancel()
        await asyncio.sleep(0.1)
        assert both.puppet.aborted == ["o"] and not both.puppet.hears
        await asyncio.sleep(3)
        assert not both.puppet.hears, "nobody listens, nobody works"

    story(work)
