"""Workers and money for a log under each way of sharing: its own arrivals through a simulated service. No torch.

Each request of the log comes when it came, whatever the service does: who would have waited for an answer before asking
again is not known. Of a long log the busiest stretch is simulated: that is what a service must be large enough for.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heliostat.bench.counting import Case, cases
from heliostat.bench.layout import Machine
from heliostat.bench.logs import WIDTH, Log, Logged
from heliostat.bench.records import Limits
from heliostat.bench.sizing import MOST, Sized, Sizing
from heliostat.bench.workloads import Call, Part, Session
from heliostat.errors import Refused

STRETCH = 1_000
"""Requests of a log that are simulated."""
WORTH = 0.10
"""Share of the cost that a sharing must save before it is worth a switch."""
APART = "independent"
LAYOUTS = tuple((split, apart) for split in (False, True) for apart in (True, False))
"""(workers prefill or decode, members whose weights differ have workers of their own)."""


@dataclass(frozen=True, slots=True)
class Priced:
    """A sharing in the layout that needs the fewest workers."""

    sized: Sized
    per_hour: float | None = None
    """In the currency of the price; None where the limits cannot be met, or nobody said a price."""
    per_million: float | None = None
    """For a million answer tokens."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """All sharings side by side."""

    machine: str
    limits: Limits
    price: float | None
    priced: tuple[Priced, ...]
    requests: int
    seconds: float
    """Of the stretch that was looked at."""
    verdict: str


def fleet(
    log: Log,
    machine: Machine,
    limits: Limits,
    *,
    price: float | None = None,
    own: Case | None = None,
    stretch: int = STRETCH,
) -> Fleet:
    """Size a service for a log. Refused for a price below 0, and for a log that does not tell lengths or times."""
    if price is not None and not 0 <= price < float("inf"):
        raise Refused(f"price is {price!r}; it must be at least 0, in any currency, for one worker and hour")
    asked = sessions_of(busiest(log, stretch))
    seconds = asked[-1].start - asked[0].start
    wanted = [*cases(log.members), *([own] if own else [])]
    priced = tuple(_priced(best(machine, case, asked, limits), price, asked, seconds) for case in wanted)
    return Fleet(machine.name, limits, price, priced, len(asked), seconds, verdict(priced))


def best(machine: Machine, case: Case, asked: Sequence[Session], limits: Limits) -> Sized:
    """The layout that needs the fewest workers by formulas, then simulated; or why there is none."""
    sizing, found, refused = Sizing(machine, case, asked, limits), [], ""
    for split, apart in LAYOUTS:
        try:
            found.append(sizing.reckoned(split=split, apart=apart))
        except Refused as error:
            refused = str(error)
    able = sorted((one for one in found if one.counts), key=lambda one: (one.workers, one.split))
    if not able and not found:
        return Sized(sharing=case.name, split=False, apart=True, counts={}, why_not=refused)
    if able and able[0].workers > MOST:
        return able[0]
    # What formulas rule out narrowly may still do, and near ones may lie the other way round: simulation decides.
    near = [one for one in able[1:2] if one.workers <= 1.5 * able[0].workers + 1]
    tried = [sizing.find(split=one.split, apart=one.apart) for one in [*(able[:1] or found[:1]), *near]]
    kept = [one for one in tried if one.counts]
    return min(kept, key=lambda one: one.workers) if kept else tried[0]


def _priced(sized: Sized, price: float | None, asked: Sequence[Session], seconds: float) -> Priced:
    if not sized.counts or price is None:
        return Priced(sized)
    hourly = price * sized.workers
    tokens = sum(call.answer_tokens for session in asked for call in session.calls) / seconds
    return Priced(sized, hourly, hourly / (3600 * tokens) * 1e6)


def verdict(priced: Sequence[Priced]) -> str:
    """One sentence, do not switch among the possible ones."""
    apart = next((one.sized for one in priced if one.sized.sharing == APART), None)
    able = sorted((one.sized for one in priced if one.sized.counts), key=lambda one: one.workers)
    if not able:
        return f"no way of sharing keeps these limits on this machine: {priced[0].sized.why_not}"
    first = able[0]
    if apart is None or not apart.counts:
        return f"separate models cannot keep these limits here; {first.sharing} can, with {_workers(first.workers)}"
    saved = 1 - first.workers / apart.workers
    if first.sharing == APART or saved < WORTH:
        return (
            f"do not switch: separate models need {_workers(apart.workers)}, and no sharing saves "
            f"{WORTH:.0%} of them"
        )
    return (
        f"worth a trial, as simulated: {first.sharing} needs {_workers(first.workers)} where separate models need "
        f"{apart.workers}, {saved:.0%} less. Measure before you switch"
    )


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count != 1 else ''}"


# ---- a log as sessions


def busiest(log: Log, most: int) -> list[Logged]:
    """The stretch of so many requests that came in the shortest time; all of a shorter log."""
    told = log.requests
    if not any(logged.answer_tokens for logged in told):
        raise Refused(
            "the log does not tell how long answers were: workers cannot be reckoned. Log answer_tokens, or answer "
            "(docs/measuring.md says what a line holds)"
        )
    if told[-1].time <= told[0].time:
        raise Refused(
            "all requests of the log came at one time: nobody can tell how many come in a second. Log time as it was"
        )
    if len(told) > most:
        spans = ((told[n + most - 1].time - told[n].time, n) for n in range(len(told) - most + 1))
        width, first = min(span for span in spans)
        if width > 0:
            told = told[first : first + most]
    return told


def sessions_of(told: Sequence[Logged]) -> list[Session]:
    """Every request as a session of its own; what a log does not hold is made of chance, in common with nothing."""
    dice, first = random.Random(0), told[0].time
    return [_session(dice, number, logged, logged.time - first) for number, logged in enumerate(told)]


def _session(dice: random.Random, number: int, logged: Logged, start: float) -> Session:
    count = max(1, logged.answer_tokens)
    answer = _ids(logged.answer, dice, count)
    prompt = _ids(logged.prompt, dice, max(1, logged.prompt_tokens))
    call = Call(
        number=0,
        member=logged.member,
        task="logged",
        prompt=(Part("user", prompt),),
        answer_tokens=count,
        stand_in=answer,
    )
    return Session(number, start, (call,))


def _ids(packed: bytes | None, dice: random.Random, count: int) -> tuple[int, ...]:
    if packed is None:
        return tuple(dice.choices(range(2**31), k=count))
    found = array("I", packed + bytes(-len(packed) % WIDTH))
    return tuple(_length(found, count, dice))


def _length(found: Sequence[int], count: int, dice: random.Random) -> Iterable[int]:
    """As many ids as were counted, should that be another number."""
    if len(found) >= count:
        return found[:count]
    return [*found, *dice.choices(range(2**31), k=count - len(found))]
