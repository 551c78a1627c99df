"""Sessions through one real engine in this process, without a server: its steps are measured, waiting is leapt over.

Time is the processor time of this thread (or, with more threads, what the clock on the wall says) while the engine
works, and jumps to the next call where nothing is there to do. So neighbours on the machine do not count as service time.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence

from heliostat.bench.records import ANSWERED, Record, Run
from heliostat.bench.simulator import Talk
from heliostat.bench.workloads import Call, Session, prompt_ids
from heliostat.engine.engine import Engine, Piece
from heliostat.engine.request import Request, Sampling
from heliostat.family import Row


class Direct:
    """An engine that answers the calls of sessions. Members with random weights go on from the ids they said."""

    def __init__(self, engine: Engine, rows: Mapping[str, Row], clock: Callable[[], float]) -> None:
        self.engine, self.rows, self.clock = engine, rows, clock
        self.now = 0.0
        self.steps: list[float] = []
        """Seconds of each step."""
        self._run = Run(0, None)
        self._due: list[tuple[float, int, Talk, Call]] = []
        self._open: dict[str, tuple[Talk, Call, Record, Request]] = {}
        self._numbers = itertools.count()

    def run(self, sessions: Sequence[Session]) -> Run:
        """Everything until the last answer."""
        for session in sessions:
            self._go_on(Talk(session))
        mark = self.clock()
        while self._due or self._open:
            if not self._open:
                self.now = max(self.now, self._due[0][0])
            while self._due and self._due[0][0] <= self.now:
                self._ask(*heapq.heappop(self._due)[2:])
            began = self.now
            pieces = self.engine.step()
            now = self.clock()
            self.now, mark = self.now + now - mark, now
            self.steps.append(self.now - began)
            for piece in pieces:
                self._hear(piece)
        return self._run

    def _go_on(self, talk: Talk) -> None:
        for call in talk.session.calls:
            if call.number not in talk.begun and all(number in talk.ends for number in call.after):
                talk.begun.add(call.number)
                ready = max((talk.ends[number] for number in call.after), default=talk.session.start)
                heapq.heappush(self._due, (ready + call.pause, next(self._numbers), talk, call))

    def _ask(self, talk: Talk, call: Call) -> None:
        due = max((talk.ends[number] for number in call.after), default=talk.session.start) + call.pause
        prompt, row = tuple(prompt_ids(call, talk.answers)), self.rows[call.member]
        record = Record(
            run=0,
            session=talk.session.number,
            call=call.number,
            member=call.member,
            task=call.task,
            time=due,
            scheduled=due,
            sent=self.now,
            pause=call.pause,
            asked_tokens=call.answer_tokens,
            prompt_tokens=len(prompt),
        )
        request = Request(
            f"{talk.session.number}/{call.number}",
            row=row,
            digests={name: self.engine.digests[name] for name in row.modules},
            prompt=prompt,
            sampling=Sampling(max_tokens=call.answer_tokens, ignore_eos=True),
            member=call.member,
        )
        self._open[request.id] = talk, call, record, request
        self.engine.add(request)

    def _hear(self, piece: Piece) -> None:
        talk, call, record, request = self._open[piece.request.id]
        if piece.sampled is not None:
            record.first = self.now if record.first is None else record.first
            record.last = self.now
            record.chunks += 1
            record.moments += 1
        if piece.finish_reason is None:
            return
        del self._open[request.id]
        record.outcome, record.end = ANSWERED, self.now
        record.seconds = record.end - record.scheduled
        record.answer_tokens, record.cached_tokens = len(request.answer), request.cached_tokens
        talk.ends[call.number], talk.answers[call.number] = self.now, tuple(request.answer)
        self._run.records.append(record)
        if len(talk.ends) == len(talk.session.calls):
            self._run.spans[talk.session.number] = talk.session.start, max(talk.ends.values())
        else:
            self._go_on(talk)
