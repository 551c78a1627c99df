"""What a worker tells of itself: how it stands, and how long things take it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from heliostat.engine.engine import Engine
from heliostat.engine.step import Step
from heliostat.serve.protocol import Parting, Stats

_NEWEST = 0.1
"""Weight of the newest measurement in a running mean."""


@dataclass(slots=True)
class Pace:
    """Measured seconds of an engine's work, as running means."""

    position: float | None = None
    """To run one more position of a prompt."""
    step: float | None = None
    """A step in which all requests decode."""

    def note(self, step: Step, seconds: float) -> None:
        """A step that took so long."""
        positions = sum(chunk.stop - chunk.start for chunk in step.chunks)
        if not step.chunks or seconds <= 0:
            return
        if all(chunk.stop - chunk.start == 1 + chunk.ahead for chunk in step.chunks):
            self.step = _mean(self.step, seconds)
        elif positions >= 4 * len(step.chunks):
            self.position = _mean(self.position, seconds / positions)


def _mean(before: float | None, value: float) -> float:
    return value if before is None else before + _NEWEST * (value - before)


def stats_of(engine: Engine, pace: Pace, *, leased: int, arriving: int) -> Stats:
    """What an engine is doing, on its thread, by its own names of modules."""
    table, scheduler, ran, brought = engine.table, engine.scheduler, engine.runner.ran, engine.arrivals
    written = table.pages_by_writer(scheduler.holders)
    return Stats(
        running=Counter(request.member for request in scheduler.running),
        waiting=Counter(request.member for request in scheduler.waiting),
        pages=table.pages,
        available=table.available(),
        leased=leased,
        arriving=arriving,
        queued_tokens=sum(request.goal - request.computed for request in scheduler.requests),
        held={writer: pages.held for writer, pages in written.items()},
        idle={writer: pages.idle for writer, pages in written.items()},
        shared_hits=tuple((w, m, count) for (w, m), count in table.counters.shared_hits.items()),
        evictions=table.counters.evictions,
        rows=dict(ran.rows),
        passes=dict(ran.passes),
        prefixes=tuple(
            Parting(
                *pair,
                met.count,
                met.common,
                met.tokens,
                met.shared,
                {str(o): n for o, n in met.outcomes.items()},
            )
            for pair, met in engine.prefixes.pairs.items()
        ),
        position_seconds=pace.position,
        step_seconds=pace.step,
        byte_seconds=brought.seconds / brought.bytes if brought.seconds else None,
    )
