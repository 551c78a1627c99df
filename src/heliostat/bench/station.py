"""A worker on counted time: the real scheduler, page table and arrivals; only what a step takes is reckoned. No torch.

It does what an engine does in a step, in the same order, and its tokens are those that the workload has planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from heliostat.bench.costs import Costs, Work, works_of
from heliostat.engine.arrivals import Arrivals
from heliostat.engine.batch import Run
from heliostat.engine.page_table import PageTable
from heliostat.engine.request import FinishReason, Request, State
from heliostat.engine.scheduler import Scheduler
from heliostat.engine.step import Step
from heliostat.engine.store import Fetch
from heliostat.serve.protocol import Described, Spent

MAX_TOKENS_PER_STEP = 2048
"""As the engine has it; a test holds them equal."""


@dataclass(slots=True)
class Moving:
    """Stands for another worker's pages: brings nothing, and counts."""

    station: Station
    bytes: int = 0
    seconds: float = 0.0

    def bring(self, index: int, target: int) -> None:
        """One more page is here."""
        size = self.station.offer.page_bytes
        self.bytes += size
        self.station.moved_seconds += size * self.station.costs.byte_seconds


@dataclass(slots=True)
class Doing:
    """A request at one worker."""

    request: Request
    came: float
    planned: Sequence[int]
    """The whole answer that it will say."""
    fetch: Moving | None = None
    began: float | None = None
    spoke: bool = False

    def spent(self, now: float) -> Spent:
        """As a worker tells it."""
        request, began = self.request, self.came if self.began is None else self.began
        fetched = 0 if self.fetch is None else max(0, request.boundary - request.cached_tokens)
        return Spent(
            waited=began - self.came,
            ran=now - began,
            computed=max(0, request.computed - request.cached_tokens - fetched),
            cached=min(request.cached_tokens, len(request.prompt)),
            bytes=0 if self.fetch is None else self.fetch.bytes,
            moving=0.0 if self.fetch is None else self.fetch.seconds,
        )


@dataclass(frozen=True, slots=True)
class Word:
    """What a step brought for a request: a token, an end, or both."""

    doing: Doing
    token: int | None
    reason: FinishReason | None


@dataclass(slots=True)
class Tally:
    """What a worker did."""

    busy: float = 0.0
    """Seconds of steps."""
    steps: int = 0
    decode_rows: int = 0
    """Summed over steps in which any request decoded."""
    decode_passes: int = 0
    prompt_rows: int = 0
    preempted: int = 0
    moved: int = 0
    """Bytes brought in."""

    def note(self, works: Sequence[Work], seconds: float) -> None:
        """One more step."""
        self.steps += 1
        self.busy += seconds
        for work in works:
            self.decode_rows += work.rows
            self.decode_passes += work.rows > 0
            self.prompt_rows += work.prompt_rows


@dataclass(slots=True, eq=False)
class Station:
    """One worker. Whoever drives it calls ``begin``, lets the seconds pass, and calls ``end``."""

    offer: Described
    runs: Mapping[str, Run]
    costs: Costs
    scheduler: Scheduler = field(init=False)
    arrivals: Arrivals = field(init=False)
    moved_seconds: float = 0.0
    """Of all pages brought in so far."""
    tally: Tally = field(default_factory=Tally)
    running: Step | None = None
    """The step that is under way."""
    _doing: dict[str, Doing] = field(default_factory=dict)
    _waiting: dict[str, Doing] = field(default_factory=dict)
    _began: float = 0.0
    _told: list[Word] = field(default_factory=list)

    def __post_init__(self) -> None:
        offer = self.offer
        self.scheduler = Scheduler(
            PageTable(offer.pages, page_size=offer.page_size),
            max_length=offer.max_length,
            max_tokens_per_step=max(MAX_TOKENS_PER_STEP, offer.max_running),
            max_running=offer.max_running,
        )
        self.arrivals = Arrivals(self.scheduler, self.costs.step_bytes, clock=lambda: self.moved_seconds)

    @property
    def idle(self) -> bool:
        """Whether nothing is here, and nothing is kept for others."""
        return not self._doing and not self.scheduler.handed

    def take(self, request: Request, planned: Sequence[int], now: float) -> None:
        """A request comes in. Refused where it can never run here."""
        doing = Doing(request, now, planned, Moving(self) if request.fetches else None)
        self.scheduler.add(request)
        self._doing[request.id] = self._waiting[request.id] = doing
        if doing.fetch is not None:
            # It has what Arrivals asks of a Fetch, and no memory behind it.
            self.arrivals.expect(request, cast(Fetch, doing.fetch))

    def release(self, order: str) -> None:
        """Pages that are kept for others are needed no more."""
        self.scheduler.finish(order)

    def begin(self, now: float) -> float | None:
        """Schedule a step; its seconds, or None where nothing can be done before something else happens."""
        assert self.running is None
        if not self.scheduler.unfinished:
            return None
        step = self.scheduler.schedule()
        before, self._began = self.moved_seconds, now
        if self.scheduler.arriving:
            self.arrivals.bring()
        moved = self.moved_seconds - before
        lost, self.scheduler.lost = self.scheduler.lost, []
        self._told = [self._ended(request) for request in (*lost, *step.handed)]
        if not (step.chunks or step.preempted or self._told or moved):
            self.scheduler.commit(step, {})
            return None
        works = works_of(step, self.runs)
        seconds = self.costs.seconds(works) + moved
        self.running = step
        self.tally.note(works, seconds)
        self.tally.preempted += len(step.preempted)
        self.tally.moved = self.arrivals.bytes
        return seconds

    def end(self) -> list[Word]:
        """The step has run: what it brought."""
        step, self.running = self.running, None
        assert step is not None
        spoke = {
            chunk.request.id: self._next(chunk.request) for chunk in step.chunks if chunk.speaker is not None
        }
        finished = self.scheduler.commit(step, spoke)
        for order, doing in list(self._waiting.items()):
            if doing.request.state is not State.WAITING or doing.request.preemptions:
                doing.began = self._began
                del self._waiting[order]
        words = []
        for chunk in step.chunks:
            speaking = None if chunk.speaker is None else self._doing.get(chunk.request.id)
            if speaking is not None:
                words.append(Word(speaking, spoke[chunk.request.id], _reason(chunk.request)))
        words += [self._ended(request) for request in finished if request.id not in spoke]
        for word in words:
            if word.reason is not None:
                self._forget(word.doing.request.id)
        told, self._told = self._told, []
        return words + told

    def _next(self, request: Request) -> int:
        return self._doing[request.id].planned[len(request.answer)]

    def _ended(self, request: Request) -> Word:
        doing = self._doing[request.id]
        doing.began = self._began if doing.began is None else doing.began
        self._forget(request.id)
        return Word(doing, None, _reason(request) or "abort")

    def _forget(self, order: str) -> None:
        self._doing.pop(order, None)
        self._waiting.pop(order, None)
        self.arrivals.forget(order)


def _reason(request: Request) -> FinishReason | None:
    return "handed" if request.state is State.HANDED else request.finish_reason
