"""Whether a family would be worth it for a log: what is shared, how busy who is, what each sharing saves as counted.

No torch. Tokens and requests are counted here; seconds, workers and money are ``fleet``'s, where a machine is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from heliostat.bench.counting import PAGE, Case, Counted, cases, count
from heliostat.bench.fleet import Fleet
from heliostat.bench.logs import Log, Logged
from heliostat.bench.parting import Moved, Pair, moved, pairs
from heliostat.serve.nodes import Standing

WORTH = 0.10
"""Share of prefill tokens, or of keys and values, that a sharing has to save to be named."""
WORTH_BATCH = 1.5
"""How many times more requests a pass of decoding has to answer, to be named."""
WINDOWS = 24
APART = "independent"
"""The sharing that every other is counted against."""


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of the log. ``start`` in seconds since its first request."""

    start: float
    rate: float
    """Requests a second."""
    in_flight: float | None
    """Mean, and of members with any in flight; None where the log does not say how long requests took."""
    members_busy: float | None
    top_share: float
    """Of the member asked most, among the requests of this stretch."""


@dataclass(frozen=True, slots=True)
class Saving:
    """A sharing beside as many separate models, as counted; 0.25: a quarter less, -0.1: a tenth more."""

    sharing: str
    prefill: float
    peak: float | None
    """Keys and values that requests in flight held at most."""
    batch: float | None
    """Requests that a pass of decoding answers, times those of separate models."""
    rows: float
    """Rows of answers, times those of separate models."""
    worth: bool
    says: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is found in a log."""

    requests: int
    seconds: float
    members: dict[str, int]
    """Member -> requests, those asked most first."""
    balance: dict[str, float]
    windows: tuple[Window, ...]
    counted: tuple[Counted, ...]
    savings: tuple[Saving, ...]
    pairs: tuple[Pair, ...]
    moved: Moved | None
    verdict: str
    notes: tuple[str, ...]
    fleet: Fleet | None = None
    """Workers and money, where a machine was named."""
    servers: tuple[Standing, ...] = ()
    """vLLM servers of the family, where machines were named."""

    def to_json(self) -> dict[str, Any]:
        """Everything, in plain values."""
        return asdict(self)


def plan(log: Log, *, own: Case | None = None, size: int = PAGE) -> Plan:
    """Look at a log. ``own``: rows that the members have now, counted as one more case."""
    wanted = [*cases(log.members), *([own] if own else [])]
    prompts = log.with_prompts
    found = count(log, wanted, size=size) if prompts else []
    savings = savings_of(found)
    shift = moved(log, wanted, size=size) if prompts and len(log.members) > 1 else None
    asked = Counter(logged.member for logged in log.requests)
    return Plan(
        requests=len(log.requests),
        seconds=log.requests[-1].time - log.requests[0].time,
        members={member: asked[member] for member in log.members},
        balance=balance(log.requests),
        windows=windows(log),
        counted=tuple(found),
        savings=tuple(savings),
        pairs=tuple(pairs(log, size=size)) if prompts else (),
        moved=shift,
        verdict=verdict(log, savings, shift),
        notes=tuple(notes(log)),
    )


def balance(requests: Sequence[Logged]) -> dict[str, float]:
    """Prefill beside decode: sums and medians of tokens."""
    prompt = sum(logged.prompt_tokens for logged in requests)
    answer = sum(logged.answer_tokens for logged in requests)
    found = {
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "prompt_median": median(logged.prompt_tokens for logged in requests),
        "answer_median": median(logged.answer_tokens for logged in requests),
    }
    if answer:
        found["prompt_per_answer"] = prompt / answer
    if all(logged.cached_tokens is not None for logged in requests):
        found["cached_tokens"] = sum(logged.cached_tokens or 0 for logged in requests)
    return found


def windows(log: Log) -> tuple[Window, ...]:
    """The log in equal stretches."""
    first, last = log.requests[0].time, log.requests[-1].time
    if last <= first:
        return ()
    width = (last - first) / WINDOWS
    came: list[Counter[str]] = [Counter() for _ in range(WINDOWS)]
    for logged in log.requests:
        came[min(WINDOWS - 1, int((logged.time - first) / width))][logged.member] += 1
    busy = _busy(log, first, width) if log.with_seconds else None
    return tuple(
        Window(
            start=n * width,
            rate=counts.total() / width,
            in_flight=busy[n][0] if busy else None,
            members_busy=busy[n][1] if busy else None,
            top_share=max(counts.values()) / counts.total() if counts else 0.0,
        )
        for n, counts in enumerate(came)
    )


def _busy(log: Log, first: float, width: float) -> list[tuple[float, float]]:
    """(mean requests in flight, mean members with any) of each window."""
    events = sorted(
        event
        for logged in log.requests
        for event in (
            (logged.time, 1, logged.member),
            (logged.time + (logged.seconds or 0.0), -1, logged.member),
        )
    )
    sums = [[0.0, 0.0] for _ in range(WINDOWS)]
    flying: Counter[str] = Counter()
    now = first
    for time, change, member in events:
        total, busy = flying.total(), len(flying)
        while now < time and (place := int((now - first) / width)) < WINDOWS:
            until = min(time, first + (place + 1) * width)
            if until <= now:  # a sliver that floating point cannot tell from nothing
                break
            sums[place][0] += (until - now) * total
            sums[place][1] += (until - now) * busy
            now = until
        now = time
        flying[member] += change
        if not flying[member]:
            del flying[member]
    return [(flight / width, busy / width) for flight, busy in sums]


def savings_of(found: Sequence[Counted]) -> list[Saving]:
    """Every other case beside separate models."""
    apart = next((counted for counted in found if counted.case == APART), None)
    if apart is None:
        return []
    return [_saving(counted, apart) for counted in found if counted is not apart]


def _saving(counted: Counted, apart: Counted) -> Saving:
    prefill = _less(counted.prefill, apart.prefill)
    peak = None if counted.peak is None or not apart.peak else _less(counted.peak, apart.peak)
    batch = counted.batch / apart.batch if counted.batch and apart.batch else None
    rows = counted.answer_rows / apart.answer_rows if apart.answer_rows else 1.0
    worth = max(prefill, peak or 0.0) >= WORTH or (batch or 0.0) >= WORTH_BATCH
    says = [_says(prefill, "prefill tokens")]
    if peak is not None:
        says.append(_says(peak, "keys and values in flight"))
    if batch is not None and batch >= 1.05:
        says.append(f"a pass of decoding answers {batch:.1f}x the requests")
    if rows > 1:
        says.append(f"{rows:.1f}x the rows of answers")
    return Saving(counted.case, prefill, peak, batch, rows, worth, "; ".join(says))


def _less(value: float, than: float) -> float:
    return 1 - value / than if than else 0.0


def _says(share: float, what: str) -> str:
    if abs(share) < 0.005:
        return f"as many {what}"
    return f"{100 * abs(share):.0f} % {'fewer' if share > 0 else 'more'} {what}"


def verdict(log: Log, savings: Sequence[Saving], shift: Moved | None) -> str:
    """One sentence, do not switch among the possible ones."""
    if len(log.members) == 1:
        return "do not switch: there is one member, and nothing to share"
    if not savings:
        return "not told: without prompts nobody can count what they have in common"
    worth = [saving for saving in savings if saving.worth]
    if not worth:
        after = [saving for saving in savings_of(shift.counted) if saving.worth] if shift else []
        if after:
            names = ", ".join(saving.sharing for saving in after)
            return f"do not switch as it is; with instructions last it is worth a trial: {names}"
        return (
            f"do not switch: no sharing saves {100 * WORTH:.0f} % of prefill or of keys and values, "
            f"or lets a pass answer {WORTH_BATCH:g}x the requests"
        )
    names = ", ".join(saving.sharing for saving in worth)
    return f"worth a trial, as counted: {names}. Tokens are no seconds: measure before you switch"


def notes(log: Log) -> list[str]:
    """What the log does not hold, and what follows from it."""
    found = []
    if log.source == "server":
        found.append("a log of heliostat serve: it holds no prompts, so what is shared is only what it met")
    if log.as_text:
        found.append("texts are counted at four bytes a token; with --family by its tokenizer")
    if log.with_prompts and not log.with_answers:
        found.append(
            "answers are not in the log: pages of answers that come back in prompts count as prefilled anew, "
            "which leaves out a gain of every row whose answers are written by who writes its prompts"
        )
    if not log.with_seconds:
        found.append("the log does not say how long requests took: nothing is told of what was in flight")
    if log.skipped:
        found.append(f"{log.skipped} lines that are no request were left out")
    return found
