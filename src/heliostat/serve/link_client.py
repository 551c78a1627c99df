"""A server's side of the line: a worker in another process, as ``protocol.Worker``.

Whatever the line does, every call is answered and every order that was taken in is heard to an end: where words are
missing for too long, or none come at all, it has Failed, and the worker is told to end what it may still be doing.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from heliostat.errors import Refused
from heliostat.serve.link import (
    BEAT,
    GRACE,
    PATIENCE,
    Abort,
    Ask,
    Beat,
    Bye,
    Call,
    Decode,
    Describe,
    Done,
    Drain,
    GetStats,
    Line,
    Load,
    No,
    Opener,
    Ping,
    Prefill,
    Release,
    Reply,
    Told,
    ToServer,
    ToWorker,
    Unload,
    sealed,
)
from heliostat.serve.log import Log
from heliostat.serve.protocol import Described, Failed, Handed, Handle, Hear, Order, Said, Stats, no

Result = Described | Handed | Failed | Stats | Done | No
_REMEMBERED = 4096
"""Calls that were given up lately: what they hand over after all is released."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A call that is not answered yet."""

    call: Call
    reply: asyncio.Future[Result]
    missing: float | None = None
    """Since when the worker knows nothing of it."""


@dataclass(slots=True, eq=False)
class _Stream:
    """An answer that is heard."""

    number: int
    """Of its call."""
    hear: Hear
    next: int
    """Place of the token that is heard next."""
    early: dict[int, Said] = field(default_factory=dict)
    """Tokens that came before those in front of them."""
    missing: float | None = None


class RemoteWorker:
    """Implements ``protocol.Worker``; works from ``start`` to ``close``."""

    def __init__(
        self, line: Line, *, log: Log | None = None, grace: float = GRACE, patience: float = PATIENCE
    ) -> None:
        """``grace``: seconds for missing words to arrive; ``patience``: without any word."""
        self._line, self._log = line, log or Log()
        self._grace, self._patience = grace, patience
        self._open_frame = Opener(ToServer, self._log)
        self._numbers = 0
        self._asked: dict[int, _Asked] = {}
        self._streams: dict[str, _Stream] = {}
        self._given_up: OrderedDict[int, None] = OrderedDict()
        self._heard = 0.0
        self._gone = ""
        self._beating: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen, on the loop that is running."""
        self._loop = asyncio.get_running_loop()
        self._heard = self._loop.time()
        self._line.receive = self._receive
        self._beating = self._loop.create_task(self._beat())

    @property
    def silent(self) -> float:
        """Seconds since the last word."""
        return self._loop.time() - self._heard

    # ---- the protocol

    async def describe(self) -> Described:
        """What it is now."""
        found = await self._result(Describe())
        assert isinstance(found, Described)
        return found

    async def _ask_for(self, order: Order, call: Call) -> Result:
        """The worker's answer to a call that runs an order. Where none is waited for any more, it is ended there."""
        try:
            return await self._ask(call)
        except ConnectionError as error:
            self.abort(order.id)
            return no(order.id, "worker_lost", str(error))
        except asyncio.CancelledError:
            self.abort(order.id)
            raise

    async def prefill(self, order: Order) -> Handed | Failed:
        """Run the positions below the boundary."""
        found = await self._ask_for(order, Prefill(order))
        return found if isinstance(found, Handed | Failed) else self._odd(order.id)

    async def decode(self, order: Order, hear: Hear, handle: Handle | None = None) -> Failed | None:
        """Take a request in."""
        self._streams[order.id] = _Stream(self._numbers + 1, hear, len(order.answer))
        found = await self._ask_for(order, Decode(order, handle))
        if isinstance(found, Done):
            return None
        self._streams.pop(order.id, None)
        return found if isinstance(found, Failed) else self._odd(order.id)

    def _odd(self, order: str) -> Failed:
        return no(order, "worker_lost", "the worker gave an answer to another question")

    def abort(self, order: str) -> None:
        """End an order wherever it stands."""
        self._streams.pop(order, None)
        for number, asked in list(self._asked.items()):
            if isinstance(asked.call, Prefill | Decode) and asked.call.order.id == order:
                del self._asked[number]
                self._give_up(number)
                _settle(asked.reply, no(order, "aborted", "it was aborted"))
        self._send(Abort(order))

    def release(self, handle: Handle) -> None:
        """Lent pages are needed no more."""
        self._send(Release(handle))

    async def stats(self) -> Stats:
        """What it is doing."""
        found = await self._result(GetStats())
        assert isinstance(found, Stats)
        return found

    async def load(self, modules: Mapping[str, str]) -> Described:
        """Host more modules of the family."""
        found = await self._result(Load(modules))
        assert isinstance(found, Described)
        return found

    async def unload(self, modules: Sequence[str]) -> Described:
        """Let modules go."""
        found = await self._result(Unload(tuple(modules)))
        assert isinstance(found, Described)
        return found

    async def drain(self) -> None:
        """Take nothing more in, and wait until all is done."""
        await self._result(Drain())

    async def close(self) -> None:
        """Let it end, and hear nothing more of it."""
        self.lost("the worker is closed")
        self._send(Bye())
        if self._beating is not None:
            self._beating.cancel()
        self._line.close()

    def lost(self, why: str) -> None:
        """It is dead, as its owner knows: all that is open fails now, and so does what is asked from now on."""
        self._gone = why
        self._fail_all(why)

    # ---- asking

    async def _ask(self, call: Call) -> Result:
        if self._gone:
            raise ConnectionError(self._gone)
        self._numbers = number = self._numbers + 1
        frame = sealed(Ask(number, call))  # first: what no frame can hold must not be waited for
        asked = self._asked[number] = _Asked(call, self._loop.create_future())
        self._line.send(frame)
        try:
            return await asked.reply
        finally:
            if self._asked.pop(number, None) is not None:
                self._give_up(number)

    async def _result(self, call: Call) -> Result:
        found = await self._ask(call)
        if isinstance(found, No):
            raise Refused(found.reason)
        return found

    def _give_up(self, number: int) -> None:
        self._given_up[number] = None
        if len(self._given_up) > _REMEMBERED:
            self._given_up.popitem(last=False)

    def _send(self, message: ToWorker) -> None:
        self._line.send(sealed(message))

    # ---- hearing

    def _receive(self, frame: bytes) -> None:
        message: ToServer | None = self._open_frame(frame)
        if message is None:
            return
        self._heard = self._loop.time()
        if isinstance(message, Reply):
            self._reply(message)
        elif isinstance(message, Told):
            for event in message.events:
                self._hear(event)
        else:
            self._compare(message)

    def _reply(self, reply: Reply) -> None:
        asked = self._asked.pop(reply.number, None)
        if asked is not None:
            _settle(asked.reply, reply.result)
        elif reply.number in self._given_up and isinstance(reply.result, Handed) and reply.result.handle:
            self.release(reply.result.handle)

    def _hear(self, event: Said | Failed) -> None:
        stream = self._streams.get(event.order)
        if stream is None:
            return
        self._taken(stream.number)
        if isinstance(event, Failed):
            del self._streams[event.order]
            stream.hear(event)
            return
        if event.number >= stream.next:
            stream.early[event.number] = event
        while (said := stream.early.pop(stream.next, None)) is not None:
            stream.next, stream.missing = stream.next + 1, None
            if said.finish is not None:
                del self._streams[event.order]
            stream.hear(said)

    def _taken(self, number: int) -> None:
        """An order of which something is known was taken in, whether or not the word of it has come."""
        asked = self._asked.get(number)
        if asked is not None and isinstance(asked.call, Decode):
            del self._asked[number]
            _settle(asked.reply, Done())

    # ---- what is missing

    async def _beat(self) -> None:
        while True:
            wanted = {*self._asked, *(stream.number for stream in self._streams.values())}
            self._send(Ping(self._numbers, tuple(sorted(wanted))))
            await asyncio.sleep(BEAT)
            if self.silent > self._patience:  # it may be heard again, though
                self._fail_all(f"no word from the worker for {self._patience:g} s")

    def _compare(self, beat: Beat) -> None:
        """Whether the worker thinks of the same calls and answers as open, and of them as far."""
        now = self._loop.time()
        for order in beat.open.keys() & self._streams.keys():
            self._taken(self._streams[order].number)
        for number in self._asked.keys() - set(beat.asked):
            asked = self._asked[number]
            asked.missing = asked.missing or now
            if now - asked.missing > self._grace:
                self._lose(number, "a call or its answer was lost")
        for asked in (self._asked[number] for number in beat.asked if number in self._asked):
            asked.missing = None
        for order, stream in list(self._streams.items()):
            if stream.number in self._asked or beat.open.get(order, stream.next + 1) <= stream.next:
                stream.missing = None
                continue
            stream.missing = stream.missing or now
            if now - stream.missing > self._grace:
                self._fail_stream(order, "words of its answer were lost")

    def _lose(self, number: int, why: str) -> None:
        asked = self._asked.pop(number)
        self._give_up(number)
        if not asked.reply.done():
            asked.reply.set_exception(ConnectionError(why))

    def _fail_stream(self, order: str, why: str) -> None:
        stream = self._streams[order]
        self.abort(order)
        stream.hear(no(order, "worker_lost", why))

    def _fail_all(self, why: str) -> None:
        for order, stream in list(self._streams.items()):
            if stream.number not in self._asked:
                self._fail_stream(order, why)
        for number in list(self._asked):
            self._lose(number, why)


def _settle(reply: asyncio.Future[Result], result: Result) -> None:
    if not reply.done():
        reply.set_result(result)
