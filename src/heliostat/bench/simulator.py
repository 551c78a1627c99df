"""A service on counted time, event by event: sessions, the real router, and workers whose steps are reckoned. No torch.

What is decided is decided by the code that serves: Router, Scheduler, PageTable, Arrivals. What is reckoned is how long
a step takes (``costs``). Not there: failures, leases that end, clients that give up, sockets; docs/limits.md has the list.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from heliostat.bench.records import ANSWERED, Record, Run
from heliostat.bench.station import Station, Word
from heliostat.bench.workloads import Call, Session, prompt_ids
from heliostat.engine.request import Request, Sampling
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.serve.protocol import Order, Spent
from heliostat.serve.router import Nowhere, Route, Router, Wish

Event = Callable[[], None]


class Watcher(Protocol):
    """Looks at a service now and then, and may hire workers or let them go."""

    every: float
    """Seconds between two looks."""

    def look(self, service: Service) -> None:
        """It is time."""


@dataclass(slots=True)
class Asked:
    """One call on its way through the service."""

    talk: Talk
    call: Call
    record: Record
    prompt: tuple[int, ...]
    wish: Wish
    route: Route | None = None
    answer: list[int] = field(default_factory=list)
    spent: list[Spent] = field(default_factory=list)
    arrived: bool = False
    tries: int = 0

    @property
    def order(self) -> Order:
        return self.wish.order


@dataclass(slots=True)
class Talk:
    """What a session knows while it goes on."""

    session: Session
    ends: dict[int, float] = field(default_factory=dict)
    answers: dict[int, Sequence[int]] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    begun: set[int] = field(default_factory=set)


class Service:
    """Workers behind a router. ``run`` sends sessions through and returns what a client would have seen."""

    def __init__(
        self,
        stations: Sequence[Station],
        rows: Mapping[str, Row],
        *,
        watcher: Watcher | None = None,
        keep_prompts: bool = False,
    ) -> None:
        """``rows``: of every member, over names of modules that the workers' offers have."""
        self.rows, self.watcher = rows, watcher
        self.router = Router()
        self.stations: dict[str, Station] = {}
        self.gone: list[Station] = []
        """Workers that were let go and have ended what they had."""
        self.now = 0.0
        self.asked: dict[str, Asked] = {}
        self.hired: dict[str, float] = {}
        """Worker -> when it was hired; ``worker_seconds``: what those that are gone were there for."""
        self.worker_seconds = 0.0
        self.prompt_tokens = self.answer_tokens = 0
        """Of what has come in so far: what whoever hires workers goes by."""
        self._events: list[tuple[float, int, Event]] = []
        self._numbers = itertools.count()
        self._lines: dict[Hashable, deque[Asked]] = {}
        self._leaving: set[str] = set()
        self._coming = 0
        self._keep = keep_prompts
        self._run = Run(0, None)
        self._left = 0
        for station in stations:
            self.join(station)

    # ---- workers

    def join(self, station: Station) -> None:
        """A worker is there."""
        name = station.offer.worker
        self.stations[name] = station
        self.hired.setdefault(name, self.now)
        self.router.join(station.offer)
        self._changed()

    def hire(self, station: Station, *, after: float) -> None:
        """A worker will be there in so many seconds, and is paid for from now on."""
        self.hired[station.offer.worker] = self.now
        self._coming += 1

        def come() -> None:
            self._coming -= 1
            self.join(station)

        self._at(self.now + after, come)

    def let_go(self, name: str) -> None:
        """A worker gets nothing more, and is gone when it has ended what it has."""
        self.router.leave(name)
        self._leaving.add(name)
        self._drop(self.stations[name])

    def _drop(self, station: Station) -> None:
        name = station.offer.worker
        if name not in self._leaving or not station.idle or station.running is not None:
            return
        if not any(asked.route and name in asked.route.names for asked in self.asked.values()):
            self._leaving.discard(name)
            self.worker_seconds += self.now - self.hired.pop(name)
            self.gone.append(self.stations.pop(name))

    @property
    def coming(self) -> int:
        """Workers that were hired and are not there yet."""
        return self._coming

    @property
    def leaving(self) -> frozenset[str]:
        """Workers that get nothing more."""
        return frozenset(self._leaving)

    def paid(self) -> float:
        """Worker-seconds until now."""
        return self.worker_seconds + sum(self.now - since for since in self.hired.values())

    # ---- time

    def _at(self, when: float, event: Event) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), event))

    def run(self, sessions: Sequence[Session]) -> Run:
        """Everything until the last answer."""
        self._left = sum(len(session.calls) for session in sessions)
        for session in sessions:
            self._run.conversations[session.number] = (
                session.number if session.conversation is None else session.conversation
            )
            self._at(session.start, partial(self._go_on, Talk(session)))
        if self.watcher is not None:
            self._at(self.watcher.every, self._look)
        while self._left:
            assert self._events, "everybody waits, and nothing is ever going to happen"
            self.now, _, event = heapq.heappop(self._events)
            event()
        return self._run

    def _look(self) -> None:
        assert self.watcher is not None
        self.watcher.look(self)
        self._at(self.now + self.watcher.every, self._look)

    # ---- sessions

    def _go_on(self, talk: Talk) -> None:
        """Calls whose turn it is: those before them have ended."""
        for call in talk.session.calls:
            if call.number in talk.begun or any(number not in talk.ends for number in call.after):
                continue
            talk.begun.add(call.number)
            ready = max((talk.ends[number] for number in call.after), default=talk.session.start)
            due = ready + call.pause
            self._at(due, partial(self._ask, talk, call))

    def _ask(self, talk: Talk, call: Call) -> None:
        record = Record(
            run=0,
            session=talk.session.number,
            call=call.number,
            member=call.member,
            task=call.task,
            time=self.now,
            scheduled=self.now,
            pause=call.pause,
            asked_tokens=call.answer_tokens,
        )
        if talk.failed & set(call.after):
            record.outcome, record.end = "skipped", self.now
            return self._over(talk, call, record)
        prompt = tuple(prompt_ids(call, talk.answers))
        record.sent, record.prompt_tokens = self.now, len(prompt)
        self.prompt_tokens += len(prompt)
        self.answer_tokens += call.answer_tokens
        if self._keep:
            record.prompt = list(prompt)
        wish = self._wish(f"{talk.session.number}/{call.number}", call, prompt, ())
        self._place(Asked(talk, call, record, prompt, wish))

    def _wish(self, name: str, call: Call, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Wish:
        row = self.rows[call.member]
        order = Order(
            id=name,
            member=call.member,
            row=row,
            digests={module: module for module in row.modules},
            prompt=prompt,
            answer=answer,
            sampling=Sampling(max_tokens=call.answer_tokens, ignore_eos=True),
        )
        return Wish(order, self._page_size)

    def _over(self, talk: Talk, call: Call, record: Record) -> None:
        """A call has ended, well or not."""
        talk.ends[call.number] = record.end
        if not record.answered:
            talk.failed.add(call.number)
        record.seconds = record.end - record.scheduled
        self._run.records.append(record)
        self._left -= 1
        if len(talk.ends) == len(talk.session.calls):
            self._run.spans[talk.session.number] = talk.session.start, max(talk.ends.values())
        else:
            self._go_on(talk)

    # ---- the server's part

    def _place(self, asked: Asked) -> None:
        """Find it workers, at once or when there are some: first come, first served among those who need the same."""
        wish = asked.wish
        key = (wish.writer if wish.boundary else None, wish.answerers)
        if key in self._lines or not self._try(asked):
            self._lines.setdefault(key, deque()).append(asked)

    @property
    def _page_size(self) -> int:
        return next(iter(self.stations.values())).offer.page_size

    def _try(self, asked: Asked) -> bool:
        wish = asked.wish
        found = self.router.route(wish, self.now)
        if isinstance(found, Nowhere):
            if not found.busy and not self._coming:
                raise Refused(f"the simulated service cannot answer {asked.call.member!r}: {found.why}")
            return False
        self.router.send(wish, found)
        self.asked[asked.order.id] = asked
        asked.route, asked.arrived = found, False
        asked.tries += 1
        asked.record.tries += 1
        station = self.stations[found.prefill or found.decode]
        send = partial(self._send, asked, station, hands=found.prefill is not None)
        self._at(self.now + station.costs.hop, send)
        return True

    def _changed(self) -> None:
        """There may be room now."""
        for key in list(self._lines):
            line = self._lines[key]
            while line and self._try(line[0]):
                line.popleft()
            if not line:
                del self._lines[key]

    def _send(self, asked: Asked, station: Station, *, hands: bool = False, fetches: bool = False) -> None:
        order = asked.order
        request = Request(
            order.id,
            row=order.row,
            digests=order.digests,
            prompt=order.prompt,
            sampling=order.sampling,
            member=order.member,
            answer=list(asked.answer),
            hands_over=hands,
            fetches=fetches,
            replays=order.row.prompt_writer in station.offer.modules,
        )
        try:
            station.take(request, asked.call.stand_in, self.now)
        except Refused as refused:
            asked.record.told = str(refused)
            return self._ended(asked, "status 400")
        self._poke(station)

    def _poke(self, station: Station) -> None:
        """Let it go on, if it stands still and there is anything to do."""
        if station.running is None and (seconds := station.begin(self.now)) is not None:
            self._at(self.now + seconds, partial(self._stepped, station))

    def _stepped(self, station: Station) -> None:
        for word in station.end():
            self._hear(station, word)
        self._poke(station)
        self._drop(station)

    def _hear(self, station: Station, word: Word) -> None:
        order = word.doing.request.id
        asked = self.asked.get(order)
        if asked is None:
            return
        heard = self.now + station.costs.hop
        if word.token is not None:
            self._said(asked, word.token, heard)
        if word.reason == "lost":
            return self._again(asked)
        if word.doing.request.hands_over:
            if word.reason is not None:
                self._handed(asked, station, word, heard)
            return
        if word.token is not None and not asked.arrived:
            self._arrived(asked, word)
        if word.reason is not None:
            self._ended(asked, ANSWERED if word.reason in ("stop", "length") else word.reason)

    def _said(self, asked: Asked, token: int, heard: float) -> None:
        asked.answer.append(token)
        record = asked.record
        record.last = heard
        record.chunks += 1
        record.moments += 1
        if record.first is None:
            record.first = heard

    def _handed(self, asked: Asked, station: Station, word: Word, heard: float) -> None:
        """A prefill is done; whoever decodes it is asked next."""
        spent = word.doing.spent(self.now)
        asked.spent.append(spent)
        self.router.prefilled(asked.order.id, spent)
        if word.reason != "handed":  # the first token ended the answer
            return self._ended(asked, ANSWERED)
        assert asked.route is not None
        decoder = self.stations[asked.route.decode]
        self._at(heard + decoder.costs.hop, partial(self._send, asked, decoder, fetches=True))
        self._changed()

    def _arrived(self, asked: Asked, word: Word) -> None:
        """The first token of who decodes: the pages of who prefilled are needed no more."""
        asked.arrived = True
        assert asked.route is not None
        spent = word.doing.spent(self.now)
        if asked.route.prefill is None:
            asked.spent.append(spent)
        self.router.arrived(asked.order.id, spent)
        self._let_pages_go(asked)
        self._changed()

    def _let_pages_go(self, asked: Asked) -> None:
        if asked.route is None or asked.route.prefill is None:
            return
        writer = self.stations.get(asked.route.prefill)
        if writer is not None and asked.order.id in writer.scheduler.handed:
            writer.release(asked.order.id)
            self._poke(writer)
            self._drop(writer)

    def _again(self, asked: Asked) -> None:
        """It lost its pages where they could not be written again: prefilled once more, with what it said so far."""
        self._let_pages_go(asked)
        del self.asked[asked.order.id]
        self.router.ended(asked.order.id)
        name = f"{asked.talk.session.number}/{asked.call.number}+{asked.tries}"
        asked.wish = self._wish(name, asked.call, asked.prompt, tuple(asked.answer))
        self._changed()
        self._place(asked)

    def _ended(self, asked: Asked, outcome: str) -> None:
        self._let_pages_go(asked)
        del self.asked[asked.order.id]
        record = asked.record
        record.outcome, record.end = outcome, max(self.now, record.last or 0.0)
        record.answer_tokens = len(asked.answer)
        if asked.spent:
            record.cached_tokens = asked.spent[0].cached
        self.router.ended(asked.order.id, asked.answer if record.answered else ())
        if record.answered:
            asked.talk.answers[asked.call.number] = tuple(asked.answer)
        self._over(asked.talk, asked.call, record)
        self._changed()
