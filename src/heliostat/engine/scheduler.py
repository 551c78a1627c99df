"""What runs in the next step: continuous batching, chunked prefill, admission, preemption, abort. No torch.

It knows rows and positions, and no module's weights; ``batch`` makes passes of what it decides.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from heliostat.engine.page_table import PageTable
from heliostat.engine.request import FinishReason, Request, State
from heliostat.engine.step import Chunk, Step
from heliostat.engine.writing import Writing, completed
from heliostat.errors import Refused

WINDOW = 16
"""Of those that wait, so many of the earliest are looked at for pages that are there already."""
OVERTAKEN = 32
"""Nobody is overtaken more often by those whose pages are there."""


class Scheduler:
    """Decides step by step: ``add``, then ``schedule``, run it, ``commit``, while ``unfinished``.

    First come, first served, but of those who wait the ones whose pages are there go first, before others write over
    them. Where pages run out the latest arrival gives up its own, and later replays every token through its own
    writer. The earliest running request always gets on, and whatever was accepted fits the pool by itself: every
    request ends, however small the pool. A step is empty only if nothing is unfinished, if all wait for pages that
    they fetch, or if pages of handed requests are in the way.

    A request that fetches gets its pages at once; they are filled between steps (``arrived``), and it runs when all
    are there. One that hands over keeps its pages, though nothing of it runs, until it is finished.
    """

    def __init__(
        self,
        table: PageTable,
        *,
        max_length: int,
        max_tokens_per_step: int = 2048,
        max_running: int = 64,
        eos_ids: Collection[int] = (),
    ) -> None:
        """At most ``max_length`` tokens of prompt and answer, ``max_tokens_per_step`` positions a step."""
        if not 1 <= max_running <= max_tokens_per_step:
            raise Refused(
                f"max_running {max_running} with max_tokens_per_step {max_tokens_per_step}: allowed is 1 to "
                "max_tokens_per_step, so that every running request can get on in every step"
            )
        self.table = table
        self.max_length = max_length
        self.max_tokens_per_step = max_tokens_per_step
        self.max_running = max_running
        self.eos_ids = frozenset(eos_ids)
        self.waiting: list[Request] = []  # both in the order of arrival
        self.running: list[Request] = []
        self.handed: dict[str, Request] = {}
        self.lost: list[Request] = []
        """Those that lost pages they cannot write themselves, until somebody takes them out."""
        self._requests: dict[str, Request] = {}
        self._arrivals = 0
        self._in_flight: Step | None = None

    @property
    def unfinished(self) -> int:
        return len(self._requests)

    @property
    def requests(self) -> Collection[Request]:
        """Those unfinished."""
        return self._requests.values()

    @property
    def holders(self) -> list[Request]:
        """All that hold pages."""
        return [*self.running, *self.handed.values()]

    @property
    def decoding(self) -> list[Request]:
        """Those whose next chunk is one position that the answer_writer writes, by arrival."""
        return [r for r in self.running if r.length - r.computed == 1 and r.computed >= r.boundary]

    @property
    def arriving(self) -> list[Request]:
        """Those that hold pages which are still to be filled from elsewhere, by arrival."""
        return [request for request in self.running if request.arriving]

    def add(self, request: Request) -> None:
        """Take a new request in; Refused, with the numbers, if it could never finish."""
        assert request.state is State.NEW, f"{request.id!r} was added before"
        if request.id in self._requests or request.id in self.handed:
            raise Refused(f"there is already an unfinished request {request.id!r}")
        self._refuse_too_long(request)
        request.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        request.state = State.WAITING
        self._requests[request.id] = request
        self.waiting.append(request)

    def _refuse_too_long(self, request: Request) -> None:
        prompt, table = len(request.prompt), self.table
        if prompt >= self.max_length:
            raise Refused(
                f"the prompt has {prompt} tokens and the longest request here has {self.max_length}, as the model or "
                f"cache_mib allows: a prompt of at most {self.max_length - 1} leaves room for an answer"
            )
        total = min(prompt + request.sampling.max_tokens, self.max_length)
        # The last token is not read again, so it is never written.
        pages = table.pages_for(request.boundary if request.hands_over else total - 1)
        room = table.pages * table.page_size + 1
        if pages > table.pages:
            raise Refused(
                f"{prompt} prompt tokens and an answer of up to {total - prompt} need {pages} pages of "
                f"{table.page_size}; the pool has {table.pages}, for {room} tokens. "
                "Ask for fewer max_tokens, shorten the prompt, or give the engine more pages"
            )

    def finish(self, request_id: str, reason: FinishReason = "abort") -> bool:
        """End a request now, in whatever state, and release its pages; False if there is none unfinished.

        Between ``schedule`` and ``commit`` too: the step then still writes into the pages, but nobody gets
        them before it is committed, and what it says for this request is dropped.
        """
        request = self._requests.get(request_id) or self.handed.get(request_id)
        if request is None:
            return False
        self._end(request, reason)
        return True

    def schedule(self) -> Step:
        """The next step; it must be committed or abandoned before the one after it is scheduled."""
        assert self._in_flight is None, "the step before was neither committed nor abandoned"
        writing = Writing(self.table)
        stops = self._stops(writing)
        chunks, preempted = self._reserve(stops)
        if not preempted:  # a pool that just ran out has no room for newcomers
            budget = self.max_tokens_per_step - sum(c.stop - c.start for c in chunks)
            chunks += self._admit(writing, budget=budget)
            budget = self.max_tokens_per_step - sum(c.stop - c.start for c in chunks)
            chunks.sort(key=lambda chunk: chunk.request.arrival)
            chunks = self._look_ahead(chunks, budget)
        handed = tuple(r for r in self.running if r.hands_over and r.computed >= r.goal)
        for request in handed:
            self._hand_over(request)
        self._in_flight = Step(tuple(chunks), tuple(preempted), handed)
        return self._in_flight

    def _look_ahead(self, chunks: Sequence[Chunk], budget: int) -> list[Chunk]:
        """The same with drafted tokens where they are wished for: in what room is left, and nobody gives up any."""
        found = []
        for chunk in chunks:
            request, size, count = chunk.request, self.table.page_size, 0
            if request.ahead and chunk.start == request.length - 1 and chunk.start >= request.boundary:
                room = (len(request.pages) + self.table.available()) * size - chunk.stop
                count = min(request.ahead, budget, room)
            if count > 0:
                stop = chunk.stop + count
                request.pages += self.table.allocate(self.table.pages_for(stop) - len(request.pages))
                chunk = replace(chunk, stop=stop, pages=tuple(request.pages), ahead=count)
                budget -= count
            found.append(chunk)
        return found

    def commit(
        self,
        step: Step,
        tokens: Mapping[str, int],
        accepted: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> list[Request]:
        """The step has run and chose ``tokens`` (request id -> token id, one for each chunk with a speaker), behind
        those ``accepted`` of the drafted ones.

        Returns the requests that it finished or handed over. What an answer ended before is not said.
        """
        assert step is self._in_flight, "only the step that was scheduled last can be committed, once"
        self._in_flight = None
        finished = []
        for chunk in step.chunks:
            request = chunk.request
            if request.state is not State.RUNNING:  # ended while the step was running
                continue
            said = [*accepted.get(request.id, ()), tokens[request.id]] if chunk.speaker is not None else []
            reason = self._say(request, said)
            # Drafted tokens that were not taken are written over: no page of theirs is kept, or offered.
            request.computed = min(chunk.stop, request.length - bool(said))
            for index in completed(chunk.start, request.computed, self.table.page_size):
                self.table.publish(request, index)
            self._give_back(chunk)
            if reason is not None:
                self._end(request, reason)
                finished.append(request)
            elif request.hands_over and request.computed >= request.boundary:
                self._hand_over(request)
                finished.append(request)
        return finished

    def _say(self, request: Request, tokens: Sequence[int]) -> FinishReason | None:
        """Add tokens to an answer until it ends; why it did."""
        for token in tokens:
            request.answer.append(token)
            if (reason := self.reason_to_end(request)) is not None:
                return reason
        return None

    def _give_back(self, chunk: Chunk) -> None:
        """Pages behind what is computed now, which a chunk had for drafted tokens."""
        request = chunk.request
        if chunk.ahead and request.state is State.RUNNING:
            keep = self.table.pages_for(request.computed)
            self.table.release(request.pages[keep:])
            del request.pages[keep:]

    def arrived(self, request: Request, pages: int) -> None:
        """So many more pages that it fetches are filled, whole; the last may reach over the boundary."""
        size, start = self.table.page_size, request.computed
        assert request.state is State.RUNNING and request.arriving and start % size == 0
        request.computed = min(start + pages * size, request.boundary)
        for index in completed(start, request.computed, size):
            self.table.publish(request, index)

    def abandon(self, step: Step) -> None:
        """The step did not run, or not to its end: its positions are still to be computed."""
        assert step is self._in_flight
        self._in_flight = None
        for chunk in step.chunks:
            self._give_back(chunk)

    def _stops(self, writing: Writing) -> dict[str, int]:
        """How far each running request should get: decoding ones first, then prefills, by arrival."""
        # max_running <= max_tokens_per_step leaves at least one position for the earliest prefill.
        stops: dict[str, int] = {}
        budget = self.max_tokens_per_step
        for request in sorted(self.running, key=lambda r: r.length - r.computed > 1):
            if request.arriving:
                writing.note(request, request.boundary)
                continue
            if request.computed == len(request.pages) * self.table.page_size:
                self._take(request, self.table.match(request))
            if request.computed >= request.goal:  # what it found just now was all that it was to run
                continue
            if not budget or writing.by_earlier(request, len(request.pages)):
                continue
            stops[request.id] = stop = _stop(request, budget)
            writing.note(request, stop)
            budget -= stop - request.computed
        return stops

    def _reserve(self, stops: Mapping[str, int]) -> tuple[list[Chunk], list[Request]]:
        """Pages for every chunk, by arrival: a victim arrived later, so it has no chunk in this step yet."""
        chunks: list[Chunk] = []
        preempted: list[Request] = []
        for request in tuple(self.running):
            if request.state is State.RUNNING and request.id in stops:
                preempted += self._make_room(request, stops[request.id])
                if request.state is State.RUNNING:
                    chunks.append(self._chunk(request, stops[request.id]))
        return chunks, preempted

    def _make_room(self, request: Request, stop: int) -> list[Request]:
        preempted = []
        while self.table.available() < self.table.pages_for(stop) - len(request.pages):
            preempted.append(victim := self.running.pop())
            self._preempt(victim)
            if victim is request:
                break
        return preempted

    def _preempt(self, request: Request) -> None:
        self.table.release(request.pages)
        request.pages.clear()
        request.computed = 0
        request.preemptions += 1
        if request.fetches and not request.replays:
            del self._requests[request.id]
            request.state, request.finish_reason = State.FINISHED, "lost"
            self.lost.append(request)
            return
        request.fetches = False
        request.state = State.WAITING
        bisect.insort(self.waiting, request, key=_arrival)

    def _admit(self, writing: Writing, *, budget: int) -> list[Chunk]:
        """In turn; who waits for a page that is just being written is passed over."""
        chunks: list[Chunk] = []
        for request in self._in_turn() if budget else ():
            if not budget or len(self.running) >= self.max_running:
                break
            cached = self.table.match(request)
            if writing.by_earlier(request, len(cached)):
                continue
            # Room for all it knows, not only for its first chunk: else it would soon be preempted again.
            if self.table.pages_for(request.goal) - len(cached) > self.table.available(without=cached):
                if request is self.waiting[0] or request.overtaken >= OVERTAKEN:
                    break
                continue
            self._start(request, cached)
            if request.arriving:
                self._make_place(request)
                writing.note(request, request.boundary)
                continue
            if request.computed >= request.goal:
                continue
            stop = _stop(request, budget)
            writing.note(request, stop)
            chunks.append(self._chunk(request, stop))
            budget -= stop - chunks[-1].start
        return chunks

    def _in_turn(self) -> list[Request]:
        """Who waits: the preempted and the too often overtaken, then who has most pages in the cache, then by arrival.

        Else a conversation that goes on would find its pages taken by others that came before its latest turn, they
        later by it, and with a pool too small for all of them nobody would find any.
        """
        if len(self.waiting) < 2 or len(self.running) >= self.max_running or not self.table.available():
            return list(self.waiting)
        near = [(self._claim(request), request) for request in self.waiting[:WINDOW]]
        near.sort(key=lambda pair: -pair[0])
        return [request for _, request in near] + self.waiting[WINDOW:]

    def _claim(self, request: Request) -> int:
        """How early a request is to be admitted: by its pages in the cache, looked for again when others came or went."""
        if request.preemptions or request.overtaken >= OVERTAKEN:
            return self.table.pages + 1  # more than anybody has
        if request.claim[0] != self.table.version:
            request.claim = self.table.version, len(self.table.match(request))
        return request.claim[1]

    def _start(self, request: Request, cached: list[int]) -> None:
        for other in self.waiting[: self.waiting.index(request)]:
            other.overtaken += 1
        if not request.preemptions:
            self.table.counters.queries += request.length
        self._take(request, cached)
        request.state = State.RUNNING
        self.waiting.remove(request)
        bisect.insort(self.running, request, key=_arrival)

    def _make_place(self, request: Request) -> None:
        missing = self.table.pages_for(request.boundary) - len(request.pages)
        request.pages += self.table.allocate(missing)

    def _take(self, request: Request, cached: list[int]) -> None:
        self.table.take(request, cached)
        request.pages += cached
        request.computed += len(cached) * self.table.page_size
        if not request.preemptions:
            request.cached_tokens += len(cached) * self.table.page_size

    def _chunk(self, request: Request, stop: int) -> Chunk:
        start, table = request.computed, self.table
        request.pages += table.allocate(table.pages_for(stop) - len(request.pages))
        table.assert_writable(request.pages[start // table.page_size :])
        speaker = request.speaker_of(stop - 1) if stop == request.length else None
        return Chunk(request, start, stop, request.writer_of(start), speaker, tuple(request.pages))

    def reason_to_end(self, request: Request) -> FinishReason | None:
        """Why an answer, of one token at least, has ended with its last token; None: it goes on."""
        sampling, answered = request.sampling, len(request.answer)
        # An end within min_tokens is only ever chosen where a grammar allows nothing else.
        enough = answered > sampling.min_tokens or request.matcher is not None
        if request.answer[-1] in self.eos_ids and not sampling.ignore_eos and enough:
            return "stop"
        if answered >= sampling.max_tokens or request.length >= self.max_length:
            return "length"
        return None

    def _hand_over(self, request: Request) -> None:
        self.running.remove(request)
        del self._requests[request.id]
        self.handed[request.id] = request
        request.state = State.HANDED

    def _end(self, request: Request, reason: FinishReason) -> None:
        if request.state is State.HANDED:
            del self.handed[request.id]
        else:
            (self.running if request.state is State.RUNNING else self.waiting).remove(request)
            del self._requests[request.id]
        self.table.release(request.pages)
        request.pages.clear()
        request.state, request.finish_reason = State.FINISHED, reason


def _arrival(request: Request) -> int:
    return request.arrival


def _stop(request: Request, budget: int) -> int:
    """End of the next chunk: what is known and affordable, and never across the boundary."""
    start, boundary = request.computed, request.boundary
    return min(request.goal, start + budget, boundary if start < boundary else request.goal)
