"""The one thread that owns the engine: it takes requests in, steps while there is work, hands pieces to asyncio.

Everything public here is called on the event loop, everything that touches the engine runs on the thread: what
crosses over is a function in the inbox, or a batch of pieces on its way back.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from heliostat.engine.engine import Engine, Piece
from heliostat.engine.request import Request, State
from heliostat.errors import Refused
from heliostat.serve.metrics import Metrics, Snapshot
from heliostat.serve.roster import family_name
from heliostat.serve.trouble import Trouble

T = TypeVar("T")
Work = Callable[[Engine], None]

LAST_STEP = 10.0
"""Seconds that the step in progress may take when the server ends; the thread does not keep the process alive."""


@dataclass(slots=True, eq=False)
class Asked:
    """The engine's requests behind one request of a client, and what comes back of them."""

    requests: tuple[Request, ...]
    inbox: asyncio.Queue[Piece | Trouble] = field(default_factory=asyncio.Queue)
    left: int = 0
    timer: asyncio.TimerHandle | None = None

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(which of the requests, piece) until all have ended; raises Trouble where one fails."""
        places = {request.id: place for place, request in enumerate(self.requests)}
        while self.left:
            found = await self.inbox.get()
            if isinstance(found, Trouble):
                raise found
            self.left -= found.finish_reason is not None
            yield places[found.request.id], found


class Owner:
    """Owns an engine from ``start`` to ``stop``."""

    def __init__(
        self, engine: Engine, metrics: Metrics, *, max_waiting: int = 256, deadline: float | None = None
    ) -> None:
        """At most ``max_waiting`` requests beyond those that run; ``deadline``: most seconds for one."""
        self.engine, self.metrics = engine, metrics
        self.most = engine.scheduler.max_running + max_waiting
        self.deadline = deadline
        self.failure = ""
        """Why nothing can be answered any more; empty while all is well."""
        self._open: dict[str, Asked] = {}  # on the loop
        self._mine: dict[str, Request] = {}  # on the thread
        self._commands: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    # ---- on the event loop

    def start(self) -> None:
        """Begin to work, for the loop that is running."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Abort what is unfinished and end the thread after the step that it is in."""
        for asked in set(self._open.values()):
            self.abort(asked)
        self._commands.put(None)
        until = time.monotonic() + LAST_STEP
        while self._thread.is_alive() and time.monotonic() < until:
            await asyncio.sleep(0.005)

    @property
    def unfinished(self) -> int:
        """Requests that were taken in and have not ended."""
        return len(self._open)

    async def ask(self, requests: Sequence[Request]) -> Asked:
        """Take requests in, all or none. Raises Trouble (429 full, 503 failed) or the engine's Refused."""
        self.refuse_if_full(len(requests))
        asked = Asked(tuple(requests), left=len(requests))
        now = time.monotonic()
        for request in requests:
            self._open[request.id] = asked
            self.metrics.begin(request, now)
        try:
            await self.call(lambda engine: self._add_all(engine, asked.requests))
        except BaseException:
            self.abort(asked)
            raise
        if self.deadline is not None and self._loop is not None:
            asked.timer = self._loop.call_later(self.deadline, self._overdue, asked)
        return asked

    def refuse_if_full(self, count: int) -> None:
        """Raise Trouble where so many more requests have no room, or nothing can be answered any more."""
        if self.failure:
            raise Trouble(503, self.failure, code="engine_failed")
        if len(self._open) + count > self.most:
            raise Trouble(
                429,
                f"the queue is full: {len(self._open)} of {self.most} requests are unfinished; try again soon",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def _overdue(self, asked: Asked) -> None:
        if any(request.id in self._open for request in asked.requests):
            self.abort(asked)
            asked.inbox.put_nowait(
                Trouble(503, f"not answered within the deadline of {self.deadline:g} s", code="deadline")
            )

    def abort(self, asked: Asked) -> None:
        """End what is unfinished of it, wherever it stands; its pages are free before the next step."""
        if asked.timer is not None:
            asked.timer.cancel()
        gone = [request for request in asked.requests if self._open.pop(request.id, None) is not None]
        for request in gone:
            self.metrics.end(request)
        if gone:
            self._commands.put(lambda engine: self._abort_all(engine, gone))

    async def call(self, work: Callable[[Engine], T]) -> T:
        """``work(engine)`` on the thread, between two steps."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def run(engine: Engine) -> None:
            try:
                result = work(engine)
            except Exception as error:  # it is the caller's, whatever it is
                loop.call_soon_threadsafe(_settle, answer, None, error)
            else:
                loop.call_soon_threadsafe(_settle, answer, result, None)

        self._commands.put(run)
        return await answer

    def _hand_out(self, pieces: Sequence[Piece], now: float) -> None:
        for piece in pieces:
            asked = self._open.get(piece.request.id)
            if asked is None:  # aborted while the step was running
                continue
            self.metrics.piece(piece, now)
            if piece.finish_reason is not None:
                del self._open[piece.request.id]
            asked.inbox.put_nowait(piece)

    def _fail(self, requests: Iterable[Request], trouble: Trouble) -> None:
        for request in requests:
            asked = self._open.pop(request.id, None)
            self.metrics.end(request)
            if asked is not None:
                asked.inbox.put_nowait(trouble)

    def _break(self, why: str) -> None:
        self.failure = why
        trouble = Trouble(503, why, code="engine_failed")
        self._fail([request for asked in set(self._open.values()) for request in asked.requests], trouble)

    # ---- on the thread

    def _run(self) -> None:
        while self._obey():
            if self.engine.unfinished and not self.failure:
                self._step()

    def _obey(self) -> bool:
        """Do what the inbox holds; waits where there is nothing else to do. False: stop."""
        idle = not self.engine.unfinished or bool(self.failure)
        while True:
            try:
                work = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if work is None:
                return False
            work(self.engine)
            idle = False

    def _step(self) -> None:
        try:
            pieces = self.engine.step()
        except Refused as error:
            self._post(self._fail, self._ended(), Trouble(503, str(error), code="member_failed"))
        except Exception as error:
            # What the step left behind is unknown: better no answer than a wrong one.
            self.failure = f"the engine failed ({type(error).__name__}); the server must be started again"
            self._post(self._break, self.failure)
        else:
            for piece in pieces:
                if piece.finish_reason is not None:
                    self._mine.pop(piece.request.id, None)
            self._post(self._hand_out, pieces, time.monotonic())

    def _ended(self) -> list[Request]:
        """Requests that the engine ended by itself."""
        gone = [request for request in self._mine.values() if request.state is State.FINISHED]
        for request in gone:
            del self._mine[request.id]
        return gone

    def _add_all(self, engine: Engine, requests: Sequence[Request]) -> None:
        if self.failure:
            raise Trouble(503, self.failure, code="engine_failed")
        added: list[Request] = []
        try:
            for request in requests:
                engine.add(request)
                self._mine[request.id] = request
                added.append(request)
        except BaseException:
            self._abort_all(engine, added)
            raise

    def _abort_all(self, engine: Engine, requests: Iterable[Request]) -> None:
        for request in requests:
            self._mine.pop(request.id, None)
            if not self.failure:
                engine.abort(request.id)

    def _post(self, function: Callable[..., None], *values: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *values)


def _settle(answer: asyncio.Future[T], result: T | None, error: Exception | None) -> None:
    if answer.cancelled():
        return
    if error is not None:
        answer.set_exception(error)
    else:
        answer.set_result(result)  # type: ignore[arg-type]


def snapshot(engine: Engine) -> Snapshot:
    """What the engine is doing, on its thread, by the names that people know."""
    table, scheduler, ran = engine.table, engine.scheduler, engine.runner.ran
    written = table.pages_by_writer(scheduler.running)
    return Snapshot(
        running=Counter(request.member for request in scheduler.running),
        waiting=Counter(request.member for request in scheduler.waiting),
        pages=table.pages,
        available=table.available(),
        held=_by_family({writer: pages.held for writer, pages in written.items()}),
        idle=_by_family({writer: pages.idle for writer, pages in written.items()}),
        shared_hits=_hits(table.counters.shared_hits),
        evictions=table.counters.evictions,
        rows=_by_family(ran.rows),
        passes=_by_family(ran.passes),
        prefixes={
            pair: replace(met, outcomes=met.outcomes.copy()) for pair, met in engine.prefixes.pairs.items()
        },
    )


def _by_family(counts: Mapping[str, int]) -> Counter[str]:
    """Counts by engine's modules -> by the family's, of which several versions may be loaded."""
    found: Counter[str] = Counter()
    for module, count in counts.items():
        found[family_name(module)] += count
    return found


def _hits(counts: Mapping[tuple[str, str], int]) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for (writer, member), tokens in counts.items():
        found[family_name(writer), member] += tokens
    return found
