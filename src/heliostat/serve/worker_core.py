"""A worker's inside, all of it on one thread: orders become requests of the engine, pieces become what is said.

It knows no thread, no socket and no event loop: whoever drives it says what time it is.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from heliostat.engine.engine import Engine, Piece
from heliostat.engine.request import Matcher, Request, State
from heliostat.engine.speculation.rule import parse_rule
from heliostat.engine.store import Fetch, Gone, Shelves
from heliostat.errors import Refused
from heliostat.serve.protocol import (
    Code,
    Described,
    Failed,
    Finish,
    Handed,
    Handle,
    Order,
    Said,
    Sampled,
    Spent,
    Stats,
    no,
)
from heliostat.serve.worker_lending import Lending, Terms, fit
from heliostat.serve.worker_stats import Pace, stats_of

Event = Said | Handed | Failed
TIDY_SECONDS = 1.0
"""Seconds after which memory of dead workers is given up; a busy worker ticks far more often."""


@dataclass(slots=True)
class _Open:
    """An order that is being worked on."""

    order: Order
    request: Request
    came: float
    fetch: Fetch | None
    deadline: float
    lease: float
    """When the lease of the pages that it fetches is over."""
    began: float | None = None
    """When it was admitted first."""
    arrived: float | None = None
    """When all pages that it fetches were here."""
    spoke: bool = False

    @property
    def fetching(self) -> bool:
        """Whether it still needs pages of another worker."""
        request = self.request
        return request.fetches and (request.arriving or request.state is State.WAITING)

    def spent(self, now: float) -> Spent:
        """What it took here so far."""
        request, fetch = self.request, self.fetch
        began = self.came if self.began is None else self.began
        fetched = 0 if fetch is None else max(0, request.boundary - request.cached_tokens)
        return Spent(
            waited=began - self.came,
            ran=now - began,
            computed=max(0, request.computed - request.cached_tokens - fetched),
            cached=min(request.cached_tokens, len(request.prompt)),
            bytes=0 if fetch is None else fetch.bytes,
            moving=0.0 if fetch is None else fetch.seconds,
            arriving=0.0 if fetch is None or self.arrived is None else max(0.0, self.arrived - began),
        )


class Core:
    """One worker's engine and what is open on it."""

    def __init__(
        self,
        engine: Engine,
        terms: Terms,
        *,
        shelves: Shelves | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``shelves``: how other workers' memories are reached; ``clock``: what transfers are measured by."""
        self.engine, self.terms = engine, terms
        engine.arrivals.clock = clock
        self.lending = Lending(engine, terms, fit(engine), shelves or Shelves())
        self.draining = False
        self.failure = ""
        """Why nothing can be answered any more; empty while all is well."""
        self._pace = Pace()
        self._open: dict[str, _Open] = {}
        self._waiting: dict[str, _Open] = {}  # those that no step had yet
        self._arriving: dict[str, _Open] = {}  # those that were admitted, and fetch
        self._due: list[tuple[float, int, str | Handle]] = []  # an order's id, or a handle that was lent
        self._numbers = itertools.count()
        self._tidied = -math.inf

    # ---- what it is

    def describe(self) -> Described:
        """As it is now."""
        engine, terms, table, pool = self.engine, self.terms, self.engine.table, self.engine.runner.pool
        return Described(
            worker=terms.worker,
            incarnation=terms.incarnation,
            modules=dict(engine.digests),
            roles=terms.roles,
            fit=self.lending.fit,
            page_size=table.page_size,
            dtype=str(pool.keys.dtype).removeprefix("torch."),
            pages=table.pages,
            page_bytes=2 * pool.keys[:, 0].numel() * pool.keys.element_size(),
            max_length=engine.max_length,
            max_running=engine.scheduler.max_running,
            credit=terms.credit,
            hands=engine.store is not None,
            draining=self.draining,
        )

    def stats(self) -> Stats:
        """What it is doing."""
        return stats_of(self.engine, self._pace, leased=len(self.lending.out), arriving=self._fetching)

    @property
    def _fetching(self) -> int:
        return sum(opened.fetching for opened in self._open.values())

    @property
    def idle(self) -> bool:
        """Nothing is open and nothing is held for others."""
        return not self._open and not self.lending.out

    @property
    def works(self) -> bool:
        """Whether a step may have something to do."""
        return bool(self.engine.unfinished) and not self.failure

    @property
    def stalled(self) -> bool:
        """Whether the latest step could do nothing, and the next cannot until something else happens."""
        return self.engine.stalled

    @property
    def wake(self) -> float:
        """When ``tick`` may have something to do next; infinite: never."""
        return self._due[0][0] if self._due else math.inf

    # ---- orders

    def prefill(self, order: Order, now: float, matcher: Matcher | None = None) -> Failed | None:
        """Take an order in, to run up to its boundary."""
        if self.engine.store is None:
            return no(order.id, "misfit", "this worker's pages cannot be read by others")
        return self._take(order, now, matcher, hands_over=True)

    def decode(
        self, order: Order, now: float, handle: Handle | None = None, matcher: Matcher | None = None
    ) -> Failed | None:
        """Take an order in, to run to its end: from its handle's pages where there is one."""
        if handle is None:
            return self._take(order, now, matcher)
        objection = self.lending.objection(order, handle, waiting=self._fetching)
        if objection is not None:
            return no(order.id, *objection)
        try:
            fetch = self.lending.fetch(handle)
        except Gone as gone:
            return no(order.id, "pages_gone", str(gone))
        return self._take(order, now, matcher, fetch=fetch, lease=now + handle.lease)

    def _take(
        self,
        order: Order,
        now: float,
        matcher: Matcher | None,
        *,
        hands_over: bool = False,
        fetch: Fetch | None = None,
        lease: float = math.inf,
    ) -> Failed | None:
        if self.failure:
            return no(order.id, "engine_failed", self.failure)
        if self.draining:
            return no(order.id, "draining", "this worker is shutting down")
        if order.id in self._open:
            return no(order.id, "refused", f"there is already an unfinished order {order.id!r}")
        self.lending.give_back_all(order.id)  # prefilled here as well: its pages are found in the cache
        try:
            request = self._request(order, matcher, hands_over=hands_over, fetches=fetch is not None)
            for name in request.needs:
                if not self.engine.hosts(name, order.digests.get(name)):
                    why = f"worker {self.terms.worker!r} does not host {name!r} with the weights asked for"
                    return no(order.id, "module_missing", why)
            self.engine.add(request, fetch)
        except Refused as refused:
            return no(order.id, "refused", str(refused))
        deadline = math.inf if order.seconds is None else now + order.seconds
        opened = _Open(order, request, now, fetch, deadline, lease)
        self._open[order.id] = self._waiting[order.id] = opened
        for when in (deadline, lease):
            self._at(when, order.id)
        return None

    def _request(self, order: Order, matcher: Matcher | None, *, hands_over: bool, fetches: bool) -> Request:
        if missing := sorted(set(order.row.modules) - set(order.digests)):
            raise Refused(f"the order has no digest of {', '.join(missing)}")
        writer = order.row.prompt_writer
        return Request(
            order.id,
            row=order.row,
            digests=order.digests,
            prompt=order.prompt,
            sampling=order.sampling,
            member=order.member,
            salt=order.salt,
            matcher=matcher,
            answer=list(order.answer),
            hands_over=hands_over,
            fetches=fetches,
            replays=self.engine.hosts(writer, order.digests[writer]),
            speculation=None if hands_over or order.speculation is None else parse_rule(order.speculation),
        )

    def abort(self, order_id: str) -> None:
        """End an order, and what was lent for it."""
        self._forget(order_id)
        if not self.failure:
            self.lending.give_back_all(order_id)
            self.engine.abort(order_id)

    def release(self, handle: Handle) -> None:
        """Lent pages are needed no more."""
        if not self.failure:
            self.lending.give_back(handle)

    def fail_all(self, code: Code, why: str) -> list[Event]:
        """Every open order ends so."""
        gone = list(self._open)
        for them in (self._open, self._waiting, self._arriving):
            them.clear()
        return [no(order, code, why) for order in gone]

    def _forget(self, order_id: str) -> None:
        for them in (self._open, self._waiting, self._arriving):
            them.pop(order_id, None)

    # ---- time

    def _at(self, when: float, about: str | Handle) -> None:
        if when < math.inf:
            heapq.heappush(self._due, (when, next(self._numbers), about))

    def tick(self, now: float) -> list[Event]:
        """What is due by now."""
        if now >= self._tidied + TIDY_SECONDS:
            self._tidied = now
            self.lending.shelves.tidy()
        found: list[Event] = []
        while self._due and self._due[0][0] <= now:
            about = heapq.heappop(self._due)[2]
            if isinstance(about, Handle):
                self.release(about)
            elif (opened := self._open.get(about)) is not None:
                found += self._overdue(opened, now)
        return found

    def _overdue(self, opened: _Open, now: float) -> list[Event]:
        order = opened.order.id
        if opened.deadline <= now:
            self.abort(order)
            return [no(order, "deadline", "not answered within its deadline")]
        if opened.lease <= now and opened.fetching:
            self.abort(order)
            return [no(order, "late", "the lease of its pages was over before they were here")]
        return []

    # ---- steps

    def step(self, clock: Callable[[], float]) -> list[Event]:
        """One step of the engine, and what came of it. Afterwards ``failure`` may be set."""
        began = clock()
        try:
            pieces = self.engine.step()
        except Refused as error:
            ended = [o.order.id for o in self._open.values() if o.request.finish_reason == "abort"]
            for order in ended:
                self._forget(order)
            return [no(order, "member_failed", str(error)) for order in ended]
        except Exception as error:
            # What the step left behind is unknown: better no answer than a wrong one.
            self.failure = f"the engine failed ({type(error).__name__}); it must be started again"
            return self.fail_all("engine_failed", self.failure)
        now = clock()
        self._pace.note(self.engine.latest, now - began)
        self._note_progress(began, now)
        return [event for piece in pieces if (event := self._event(piece, now)) is not None]

    def _note_progress(self, began: float, now: float) -> None:
        """After a step from ``began`` to ``now``: who was admitted in it, and whose pages are all here."""
        for order, opened in list(self._waiting.items()):
            if opened.request.state is not State.WAITING or opened.request.preemptions:
                opened.began = began
                del self._waiting[order]
                if opened.fetch is not None:
                    self._arriving[order] = opened
        for order, opened in list(self._arriving.items()):
            if not opened.request.arriving:
                opened.arrived = now if opened.fetch and opened.fetch.bytes else opened.began
                del self._arriving[order]

    def _event(self, piece: Piece, now: float) -> Event | None:
        request, reason = piece.request, piece.finish_reason
        opened = self._open.get(request.id)
        if opened is None or opened.request is not request:
            return None
        if reason is not None:
            self._forget(request.id)
        if reason == "lost":
            why = "it lost its pages to others, and the module that wrote its prompt is not hosted here"
            return no(request.id, "pages_lost", why)
        if reason == "gone":
            return no(request.id, "pages_gone", piece.why)
        said = None if piece.sampled is None else self._said(opened, piece, now)
        if request.hands_over and reason is not None:
            handle = self._lend(opened, now) if reason == "handed" else None
            return Handed(request.id, handle, opened.spent(now), said)
        return said

    def _lend(self, opened: _Open, now: float) -> Handle:
        handle = self.lending.lend(opened.order, opened.request)
        self._at(now + handle.lease, handle)
        return handle

    def _said(self, opened: _Open, piece: Piece, now: float) -> Said:
        request, sampled = piece.request, piece.sampled
        assert sampled is not None
        spent, told = None if opened.spoke else opened.spent(now), piece.speculated
        opened.spoke = True
        return Said(
            request.id,
            piece.place,
            Sampled(sampled.token, sampled.logprob, sampled.top),
            piece.text,
            _finish(piece),
            request.preemptions,
            spent,
            None if told is None else (told.drafted, told.accepted, told.judged),
        )


def _finish(piece: Piece) -> Finish | None:
    reason = piece.finish_reason
    return reason if reason == "stop" or reason == "length" else None
