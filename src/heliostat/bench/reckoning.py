"""How many workers a load needs, from formulas: where simulating event by event would take too long. No torch.

Who decodes is a queue that always finds a batch: the batch is the one at which requests end as fast as they come
(Little's law). Who prefills is a queue with several servers: waiting is Erlang's, corrected by how much the times of
service vary (Lee and Longton's rule). A test holds both beside the simulator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from heliostat.bench.costs import Costs, Work
from heliostat.bench.counting import Case
from heliostat.bench.layout import Machine, Pool
from heliostat.bench.records import Limits
from heliostat.serve.router import DECODE, PREFILL

LATE = 0.05
"""Share of requests that may miss a limit where a percentile stands for it."""
STABLE = 0.98
"""Share of its time that a worker may be busy, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What comes in for one member, on average."""

    rate: float
    """Requests a second."""
    prompt: float
    """Tokens."""
    fresh: float
    """Tokens of the prompt that have to run."""
    answer: float
    spread: float = 1.0
    """Variance of ``fresh`` over its mean squared."""


@dataclass(frozen=True, slots=True)
class Reckoned:
    """One pool under a load."""

    busy: float
    """Share of the time. Who decodes is busy whenever anything is there, and has room all the same."""
    tpot: float | None = None
    """Seconds; None, like ``wait``: more comes than ever ends."""
    wait: float | None = None
    """Seconds until a prompt's turn that 95 of 100 stay below; ``run``: seconds of a mean prompt."""
    run: float | None = None
    batch: float = 0.0


def step_seconds(
    case: Case, costs: Costs, shares: Mapping[str, float], batch: float, context: float
) -> float:
    """Mean seconds of a decode step over so many requests of members in these shares.

    A pass runs where any of its requests is there, and has the rows that it then has on average.
    """
    touched: dict[str, float] = {}
    rows: dict[str, float] = {}
    ridden: dict[str, list[float]] = {}
    for member, share in shares.items():
        row = case.rows[member]
        parts = dict.fromkeys((row.answer_writer, row.speaker))
        for weights in {case.weights.get(part, part) for part in parts}:
            touched[weights] = touched.get(weights, 0.0) + share
        for part in parts:
            weights = case.weights.get(part, part)
            rows[weights] = rows.get(weights, 0.0) + share
            if part in case.weights:
                ridden.setdefault(weights, []).append(share)
    still = costs.seconds([])
    total = still
    for weights, share in touched.items():
        chance = _any(share, batch)
        here = batch / chance
        riding = ridden.get(weights, [])
        work = Work(
            weights,
            rows=max(1, round(here * rows[weights])),
            context=round(here * share * context),
            adapters=round(sum(_any(one, batch) for one in riding) / chance),
            adapted_rows=round(here * sum(riding)),
            sampled=max(1, round(here * share)),
        )
        total += chance * (costs.seconds([work]) - still)
    return total


def _any(share: float, batch: float) -> float:
    """Chance that any of a batch is one of this share."""
    return 1 - (1 - min(1.0, share)) ** batch if share < 1 else 1.0


def reckon(machine: Machine, case: Case, pool: Pool, demand: Mapping[str, Demand], count: int) -> Reckoned:
    """A pool of so many workers."""
    own = {member: demand[member] for member in pool.members if demand[member].rate > 0}
    rate = sum(one.rate for one in own.values()) / count
    if not rate:
        return Reckoned(0.0, 0.0, 0.0, 0.0)
    shares = {member: one.rate / count / rate for member, one in own.items()}
    run = _mean(own, shares, "fresh")
    answer, prompt = _mean(own, shares, "answer"), _mean(own, shares, "prompt")
    served = prompt_seconds(machine.costs, run, prompt)
    if DECODE not in pool.roles:
        spread = _mean(own, shares, "spread")
        return _queue(rate * count, served, spread, count)
    context = prompt + answer / 2
    moving = machine.page_bytes / machine.page_size * prompt * machine.costs.byte_seconds
    beside = served if PREFILL in pool.roles else moving
    room = machine.pages_beside(pool.modules, case) * machine.page_size
    most = min(machine.max_running, room / (prompt + answer))
    found = _batch(machine, case, shares, rate, answer, context, beside, most)
    if PREFILL not in pool.roles or found.tpot is None:
        return found
    waiting = _queue(rate * count, served, _mean(own, shares, "spread"), count)
    wait = None if waiting.wait is None else waiting.wait + found.tpot
    return Reckoned(found.busy, found.tpot, wait, served, found.batch)


def _mean(demand: Mapping[str, Demand], shares: Mapping[str, float], name: str) -> float:
    """Mean of a field over requests."""
    return sum(share * float(getattr(demand[member], name)) for member, share in shares.items())


def prompt_seconds(costs: Costs, fresh: float, prompt: float) -> float:
    """Of a prompt of which so many tokens have to run."""
    rows = max(1, round(fresh))
    work = Work("", prompt_rows=rows, read=round(prompt), pairs=round(rows * (prompt - fresh / 2)), sampled=1)
    return costs.seconds([work])


def _batch(
    machine: Machine,
    case: Case,
    shares: Mapping[str, float],
    rate: float,
    answer: float,
    context: float,
    beside: float,
    most: float,
) -> Reckoned:
    """The batch at which as many answers end as come; ``beside``: seconds that each request takes of all others.

    ``most``: requests that may run, and whose pages fit.
    """
    free = 1 - rate * beside
    if free <= 1 - STABLE:
        return Reckoned(1.0)
    batch = 0.0
    for _ in range(200):
        tpot = step_seconds(case, machine.costs, shares, max(1.0, batch), context) / free
        wanted = rate * answer * tpot
        if wanted > most:
            return Reckoned(1.0)
        if abs(wanted - batch) < 1e-6:
            break
        batch = wanted
    step = step_seconds(case, machine.costs, shares, max(1.0, batch), context)
    return Reckoned(min(1.0, rate * beside + free * (1 - math.exp(-batch))), step / free, batch=batch)


def _queue(rate: float, served: float, spread: float, count: int) -> Reckoned:
    """Several servers and one line: when 95 of 100 have their turn."""
    offered = rate * served
    busy = offered / count
    if busy >= STABLE:
        return Reckoned(min(1.0, busy), run=served)
    blocked = 1.0  # Erlang's loss formula, one server after the other
    for number in range(1, count + 1):
        blocked = offered * blocked / (number + offered * blocked)
    waits = blocked / (1 - busy * (1 - blocked))
    slow = (1 + spread) / 2
    wait = max(0.0, math.log(max(waits, 1e-12) / LATE)) * slow * served / (count * (1 - busy))
    return Reckoned(busy, wait=wait, run=served)


def meets(found: Reckoned, limits: Limits, roles: Sequence[str]) -> bool:
    """Whether a pool keeps the limits that are its part."""
    if DECODE in roles and (found.tpot is None or found.tpot > limits.tpot):
        return False
    return PREFILL not in roles or (
        found.wait is not None and found.run is not None and found.wait + found.run <= limits.ttft
    )


def fewest(
    machine: Machine, case: Case, pool: Pool, demand: Mapping[str, Demand], limits: Limits, *, most: int
) -> int | None:
    """The smallest number of workers with which a pool keeps its limits; None: not with ``most`` of them."""
    low, high = 1, 1
    while not meets(reckon(machine, case, pool, demand, high), limits, pool.roles):
        if high >= most:
            return None
        low, high = high + 1, min(most, 2 * high)
    while low < high:
        middle = (low + high) // 2
        if meets(reckon(machine, case, pool, demand, middle), limits, pool.roles):
            high = middle
        else:
            low = middle + 1
    return low


def spread_of(values: Sequence[float]) -> float:
    """Variance over the mean squared."""
    mean = fmean(values)
    return fmean((value - mean) ** 2 for value in values) / mean**2 if mean else 0.0
