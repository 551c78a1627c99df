"""Numbers that a sceptic may believe: percentiles from enough sessions, intervals, a queue that does not grow. No torch.

Calls of one session are no independent samples. So what is drawn again and again for an interval is sessions.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

LEAST: Mapping[int, int] = {50: 1, 95: 200, 99: 1000}
"""Percentile -> sessions below which it is not told."""
RESAMPLES = 500
WARM_UP = 0.2
"""Share of a run that is not looked at when the queue is."""
WINDOWS = 10
GROWTH = 0.25
"""Of its mean, over a run: a queue that grows more, and steadily so, grows."""
STEADY = 2.306
"""Student's t, 8 degrees of freedom, one side of 2.5 %."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its interval (95 %), or the reason why there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    why_not: str = ""

    def to_json(self) -> dict[str, Any]:
        """Without what is not there."""
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


@dataclass(frozen=True, slots=True)
class Queue:
    """How many sessions were in flight over a run, and whether they became ever more."""

    means: tuple[float, ...]
    """Of equal windows, after the warm-up."""
    grows: bool
    why: str = ""


def percentile(
    samples: Sequence[tuple[int, float]], q: int, *, grows: bool = False, seed: int = 0
) -> Estimate:
    """The q-th percentile of (session, value), nearest rank; none from too few sessions or over a growing queue."""
    counts = Counter(session for session, _ in samples)
    sessions = len(counts)
    if sessions < LEAST[q]:
        return Estimate(None, why_not=f"too few: {sessions} sessions of {LEAST[q]}")
    if grows and q > 50:
        return Estimate(None, why_not="the queue grows")
    ordered = sorted((value, session) for session, value in samples)
    names = sorted(counts)
    dice = random.Random(seed)
    drawn: list[float] = []
    for _ in range(RESAMPLES if sessions > 1 else 0):
        weights = dict.fromkeys(names, 0)
        for name in dice.choices(names, k=sessions):
            weights[name] += 1
        drawn.append(_weighted(ordered, weights, counts, q))
    value = _weighted(ordered, dict.fromkeys(names, 1), counts, q)
    return Estimate(value, *interval(drawn)) if drawn else Estimate(value)


def _weighted(
    ordered: Sequence[tuple[float, int]], weights: Mapping[int, int], counts: Mapping[int, int], q: int
) -> float:
    rank = max(1, math.ceil(sum(weights[session] * count for session, count in counts.items()) * q / 100))
    reached = 0
    for value, session in ordered:
        reached += weights[session]
        if reached >= rank and weights[session]:
            return value
    raise AssertionError("a rank is never above the sum")


def ratio(parts: Iterable[tuple[int, float, float]], *, seed: int = 0) -> Estimate:
    """Sum over sum of (session, numerator, denominator), with an interval over sessions."""
    sums: dict[int, tuple[float, float]] = {}
    for session, over, under in parts:
        before = sums.get(session, (0.0, 0.0))
        sums[session] = before[0] + over, before[1] + under
    pairs = list(sums.values())
    if not sum(under for _, under in pairs):
        return Estimate(None, why_not="nothing was counted")
    drawn = bootstrap(pairs, _quotient, seed=seed)
    return Estimate(_quotient(pairs), *(interval(drawn) if drawn else ()))


def _quotient(pairs: Sequence[tuple[float, float]]) -> float:
    under = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / under if under else math.nan


def bootstrap(
    values: Sequence[Any], find: Callable[[Sequence[Any]], float], *, seed: int = 0, times: int = RESAMPLES
) -> list[float]:
    """``find`` of as many values drawn with return, again and again; of a single value, nothing."""
    if len(values) < 2:
        return []
    dice = random.Random(seed)
    return [find(dice.choices(values, k=len(values))) for _ in range(times)]


def interval(drawn: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of what was drawn."""
    ordered = sorted(value for value in drawn if not math.isnan(value))
    if not ordered:
        return math.nan, math.nan
    last = len(ordered) - 1
    return ordered[math.floor(0.025 * last)], ordered[math.ceil(0.975 * last)]


def paired_ratio(
    ours: Sequence[float], theirs: Sequence[float], *, least: int = 5, seed: int = 0
) -> Estimate:
    """Median of ours / theirs over runs that were made in turns, the k-th of one beside the k-th of the other."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} runs beside {len(theirs)}: runs are paired")
    if len(ours) < least:
        return Estimate(None, why_not=f"too few: {len(ours)} pairs of {least}")
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return Estimate(median(ratios), *interval(bootstrap(ratios, median, seed=seed)))


def queue(spans: Sequence[tuple[float, float]]) -> Queue:
    """Whether sessions, from their scheduled starts to their ends (seconds), piled up while they came in.

    The time in which they came, less a warm-up, is cut into windows. The queue grows where a line through the
    windows' means rises by more than chance and by more than a quarter of the mean.
    """
    first, last = min(start for start, _ in spans), max(start for start, _ in spans)
    begin = first + WARM_UP * (last - first)
    if len(spans) < 2 * WINDOWS or last <= begin:
        return Queue((), False, "too few sessions to tell")
    width = (last - begin) / WINDOWS
    means = [
        sum(_overlap(span, begin + n * width, begin + (n + 1) * width) for span in spans) / width
        for n in range(WINDOWS)
    ]
    slope, error = _line(means)
    rise, mean = slope * (WINDOWS - 1), fmean(means)
    grows = rise > max(GROWTH * mean, 1.0) and slope > STEADY * error
    why = f"from {means[0]:.1f} to {means[-1]:.1f} sessions in flight" if grows else ""
    return Queue(tuple(means), grows, why)


def _overlap(span: tuple[float, float], begin: float, end: float) -> float:
    return max(0.0, min(span[1], end) - max(span[0], begin))


def _line(values: Sequence[float]) -> tuple[float, float]:
    """(slope a step, its standard error) of the straight line of least squares."""
    count, middle, mean = len(values), (len(values) - 1) / 2, fmean(values)
    square = sum((n - middle) ** 2 for n in range(count))
    slope = sum((n - middle) * (value - mean) for n, value in enumerate(values)) / square
    rest = sum((value - mean - slope * (n - middle)) ** 2 for n, value in enumerate(values))
    return slope, math.sqrt(rest / (count - 2) / square)
