"""Asks an engine in this process, without HTTP: its steps and whoever asks take turns on one thread, the event loop's.

So nobody takes a core from a step; what the client does between two steps is counted. No torch of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from heliostat.bench.client import Answer, Asking
from heliostat.bench.records import ANSWERED, Record
from heliostat.bench.workloads import Session
from heliostat.engine.engine import Engine, Piece
from heliostat.engine.request import Request, Sampling
from heliostat.engine.step import Step
from heliostat.errors import Refused
from heliostat.family import Row

TURNS = 6
"""Turns of the event loop in which an answer becomes the next call of its session: no step runs in between."""


class Gate:
    """At most so many sessions at a time; the others wait in the order in which they come. None: all at once."""

    def __init__(self, most: int | None, sessions: Sequence[Session]) -> None:
        self._room = None if most is None else asyncio.Semaphore(most)
        self._calls = {session.number: len(session.calls) for session in sessions}
        self._inside: set[int] = set()

    async def enter(self, session: int) -> None:
        """Wait for room, where this session is not inside yet."""
        if self._room is not None and session not in self._inside:
            self._inside.add(session)
            await self._room.acquire()

    def leave(self, session: int, *, failed: bool) -> None:
        """One of its calls has ended; with the last one, or one that failed, the session makes room."""
        self._calls[session] -= 1
        if self._room is not None and session in self._inside and (failed or not self._calls[session]):
            self._inside.discard(session)
            self._room.release()


@dataclass(slots=True)
class Timesheet:
    """Where an engine's time went. Seconds; rows are positions that ran."""

    steps: int = 0
    stepping: float = 0.0
    idle: float = 0.0
    """Nothing was asked."""
    decoding: float = 0.0
    """In steps that only decode."""
    decoding_steps: int = 0
    decode_rows: int = 0
    prefill_rows: int = 0
    preemptions: int = 0

    def note(self, step: Step, seconds: float) -> None:
        """A step has run."""
        rows = sum(c.stop - c.start for c in step.chunks)
        # Whoever reads a prompt's last token again decodes, but it is one of the prompt's rows.
        reads = sum(max(0, min(c.stop, len(c.request.prompt)) - c.start) for c in step.chunks)
        self.steps += 1
        self.stepping += seconds
        self.prefill_rows += reads
        self.decode_rows += rows - reads
        self.preemptions += len(step.preempted)
        if rows and all(c.start >= c.request.boundary for c in step.chunks):
            self.decoding += seconds
            self.decoding_steps += 1

    def shares(self, wall: float) -> dict[str, float]:
        """Seconds by what was done; a step that does both decodes as long as a step that only decodes."""
        mixed = self.stepping - self.decoding
        usual = self.decoding / self.decoding_steps if self.decoding_steps else 0.0
        said = min(mixed, usual * (self.steps - self.decoding_steps))
        return {
            "prefill": mixed - said,
            "decode": self.decoding + said,
            "idle": self.idle,
            "client": max(0.0, wall - self.stepping - self.idle),
        }


def _now() -> float:
    return asyncio.get_running_loop().time()


@dataclass(slots=True)
class _Seat:
    """A request that is being answered. Times are the loop's."""

    record: Record
    request: Request
    done: asyncio.Future[None]
    begun: float | None = None


@dataclass(slots=True)
class Seated:
    """One engine with the rows of its members. ``run`` must be running while ``ask`` is awaited."""

    engine: Engine
    rows: Mapping[str, Row]
    gate: Gate
    sheet: Timesheet = field(default_factory=Timesheet)
    _open: dict[str, _Seat] = field(default_factory=dict)
    _work: asyncio.Event = field(default_factory=asyncio.Event)
    _count: int = 0
    _failure: BaseException | None = None

    async def ask(self, asking: Asking, record: Record) -> Answer:
        """As ``driving`` asks; what came of it stands in the record."""
        record.sent, record.tries = _now(), 1
        await self.gate.enter(record.session)
        try:
            request = self._request(asking)
            await self._answered(request, record)
            return Answer(ids=list(request.answer))
        except Refused as error:
            record.outcome, record.told = "error", str(error)
            return Answer()
        finally:
            record.end = _now()
            self.gate.leave(record.session, failed=not record.answered)

    def _request(self, asking: Asking) -> Request:
        self._count += 1
        return Request(
            str(self._count),
            row=self.rows[asking.member],
            digests=dict(self.engine.digests),
            prompt=tuple(asking.ids or ()),
            sampling=Sampling(max_tokens=asking.max_tokens, ignore_eos=True),
            member=asking.member,
        )

    async def _answered(self, request: Request, record: Record) -> None:
        if self._failure is not None:
            raise self._failure
        self.engine.add(request)
        seat = _Seat(record, request, asyncio.get_running_loop().create_future())
        self._open[request.id] = seat
        self._work.set()
        try:
            await seat.done
        finally:
            del self._open[request.id]
            self.engine.abort(request.id)  # nothing, where it has ended
        record.outcome = ANSWERED

    async def run(self) -> None:
        """Step by step while anything is asked, until it is cancelled."""
        try:
            while True:
                await self._wait()
                begun = _now()
                pieces = self.engine.step()
                self._note(pieces, begun, _now())
                for _ in range(TURNS if any(p.finish_reason for p in pieces) else 1):
                    await asyncio.sleep(0)
        except BaseException as error:
            self._failure = error
            for seat in self._open.values():
                if not seat.done.done():
                    seat.done.set_exception(error)
            raise

    async def _wait(self) -> None:
        begun = _now()
        while not self.engine.unfinished:
            self._work.clear()
            await self._work.wait()
        self.sheet.idle += _now() - begun

    def _note(self, pieces: Sequence[Piece], begun: float, now: float) -> None:
        step = self.engine.latest
        self.sheet.note(step, now - begun)
        for chunk in step.chunks:
            seat = self._open.get(chunk.request.id)
            if seat is not None and seat.begun is None:
                seat.begun = begun
        for piece in pieces:
            if (seat := self._open.get(piece.request.id)) is not None:
                self._heard(seat, piece, now)

    def _heard(self, seat: _Seat, piece: Piece, now: float) -> None:
        record = seat.record
        if piece.sampled is not None:
            record.first = now if record.first is None else record.first
            record.last = now
            record.chunks += 1
            record.moments += 1
        if piece.finish_reason is None or seat.done.done():
            return
        if piece.finish_reason != "length":
            seat.done.set_exception(Refused(f"the answer ended with {piece.finish_reason}: {piece.why}"))
            return
        request = seat.request
        assert record.sent is not None and record.first is not None and seat.begun is not None
        record.prompt_tokens, record.answer_tokens = len(request.prompt), len(request.answer)
        record.cached_tokens = min(request.cached_tokens, len(request.prompt))
        record.phases = {
            "queue": seat.begun - record.sent,
            "prefill": record.first - seat.begun,
            "transfer": 0.0,
            "decode": now - record.first,
        }
        seat.done.set_result(None)
