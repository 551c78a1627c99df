"""A worker's side of the line: calls that come in are made, and what is said goes out, one frame a batch."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from heliostat.errors import Refused
from heliostat.serve.link import (
    BEAT,
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
from heliostat.serve.protocol import Described, Failed, Handed, Said, Stats, Worker

_REMEMBERED = 4096
"""Numbers of calls that came lately: one of them again is dropped."""


class Servant:
    """Serves a worker to whoever is at the other end of a line, from ``start`` to ``stop``."""

    def __init__(self, worker: Worker, line: Line, *, log: Log | None = None) -> None:
        self._worker, self._line, self._log = worker, line, log or Log()
        self._open_frame = Opener(ToWorker, self._log)
        self._asked: dict[int, asyncio.Task[None]] = {}
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._orders: dict[int, str] = {}  # number of the call -> its order, until nothing of it is left
        self._open: dict[str, tuple[int, int]] = {}  # order -> (number of the call, place of the next token)
        self._untold: list[Said | Failed] = []
        self._beating: asyncio.Task[None] | None = None
        self.dismissed = asyncio.Event()
        """Set when the other end needs the worker no more."""

    def start(self) -> None:
        """Begin to listen, on the loop that is running."""
        self._line.receive = self._receive
        self._beating = asyncio.get_running_loop().create_task(self._beat())

    def stop(self) -> None:
        """Say nothing more; what is open stays as it is."""
        for task in (self._beating, *self._asked.values()):
            if task is not None:
                task.cancel()
        self._line.close()

    def _send(self, message: ToServer) -> None:
        self._line.send(sealed(message))

    async def _beat(self) -> None:
        while True:
            places = {order: place for order, (_, place) in self._open.items()}
            self._send(Beat(tuple(self._asked), places))
            await asyncio.sleep(BEAT)

    # ---- what comes in

    def _receive(self, frame: bytes) -> None:
        message: ToWorker | None = self._open_frame(frame)
        if isinstance(message, Ask):
            self._ask(message)
        elif isinstance(message, Abort):
            self._abort(message.order)
        elif isinstance(message, Release):
            self._worker.release(message.handle)
        elif isinstance(message, Ping):
            self._ping(message)
        elif isinstance(message, Bye):
            self.dismissed.set()

    def _ask(self, ask: Ask) -> None:
        if ask.number in self._seen:
            return
        self._seen[ask.number] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        if isinstance(ask.call, Prefill | Decode):
            self._orders[ask.number] = ask.call.order.id
        task = asyncio.get_running_loop().create_task(self._answer(ask))
        self._asked[ask.number] = task
        task.add_done_callback(lambda _: self._asked.pop(ask.number, None))

    async def _answer(self, ask: Ask) -> None:
        try:
            result = await self._call(ask.number, ask.call)
        except Refused as refused:
            result = No(str(refused))
        except ConnectionError as error:
            result = No(f"the worker is gone: {error}")
        self._send(Reply(ask.number, result))

    async def _call(self, number: int, call: Call) -> Described | Handed | Failed | Stats | Done | No:
        worker = self._worker
        if isinstance(call, Prefill):
            try:
                return await worker.prefill(call.order)
            finally:
                self._orders.pop(number, None)
        if isinstance(call, Decode):
            return await self._decode(number, call)
        if isinstance(call, Describe):
            return await worker.describe()
        if isinstance(call, GetStats):
            return await worker.stats()
        if isinstance(call, Load):
            return await worker.load(call.modules)
        if isinstance(call, Unload):
            return await worker.unload(call.modules)
        assert isinstance(call, Drain)
        await worker.drain()
        return Done()

    async def _decode(self, number: int, call: Decode) -> Failed | Done:
        order = call.order
        self._open[order.id] = (number, len(order.answer))
        failed = await self._worker.decode(order, self._hear, call.handle)
        if failed is None:
            if order.id not in self._open:  # its abort came before it was taken in, or it has ended already
                self._worker.abort(order.id)
            return Done()
        self._close(order.id)
        return failed

    def _abort(self, order: str) -> None:
        self._close(order)
        self._worker.abort(order)

    def _close(self, order: str) -> None:
        if (found := self._open.pop(order, None)) is not None:
            self._orders.pop(found[0], None)

    def _ping(self, ping: Ping) -> None:
        """End what nobody waits for: its abort was lost, or came too early."""
        wanted = set(ping.wanted)
        unwanted = [o for number, o in self._orders.items() if number <= ping.upto and number not in wanted]
        for order in unwanted:
            self._abort(order)

    # ---- what goes out

    def _hear(self, event: Said | Failed) -> None:
        opened = self._open.get(event.order)
        if opened is None:
            return
        if isinstance(event, Failed) or event.finish is not None:
            self._close(event.order)
        else:
            self._open[event.order] = (opened[0], event.number + 1)
        if not self._untold:
            asyncio.get_running_loop().call_soon(self._tell)
        self._untold.append(event)

    def _tell(self) -> None:
        events, self._untold = self._untold, []
        self._send(Told(tuple(events)))
