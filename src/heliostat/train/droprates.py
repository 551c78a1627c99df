"""How often each residual branch is dropped in the backward pass, and which ones are in a step. Knows no tensors.

DropBP, arXiv 2402.17812: more insensitive branches are dropped more often, until the share of the branches' FLOPs
that is dropped is the one asked for. A step's draw is a function of seed and step number alone: it needs no state, is
the same on every rank, and goes on exactly after an interruption.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from heliostat.errors import Refused

HIGHEST = 0.95
"""Highest rate that can be asked for."""
CAP = 0.9
"""No branch is dropped more often than this, unless a higher rate is asked for."""
STEP = 0.1
"""By so much the rate of one branch rises at a time."""
CLOSE = 0.01
"""Whole numbers of branches are kept in each step where that moves the dropped share by no more than this."""
_FINE = 1 << 30  # draws are made in whole numbers: sums of rates must not lose a branch to rounding


@dataclass(frozen=True, slots=True)
class Branch:
    """One residual branch."""

    layer: int
    kind: str
    """attention or mlp."""
    flops: float
    """Of its backward pass, a token; branches of one kind cost the same."""
    trained: bool = True
    """Whether parameters that are trained lie in it."""

    @property
    def name(self) -> str:
        """As the rates are shown."""
        return f"{self.layer}.{self.kind}"


def check_rate(rate: float) -> float:
    """The rate itself; refused outside of [0, HIGHEST]."""
    if not 0 <= rate <= HIGHEST:
        raise Refused(
            f"dropbp is {rate}; it is the share of the branches' backward pass that is dropped, 0 to {HIGHEST}"
        )
    return rate


def uniform(branches: Sequence[Branch], rate: float) -> tuple[float, ...]:
    """The same rate for every branch, but for what `whole` moves."""
    return whole(branches, [rate] * len(branches), rate)


def by_sensitivity(
    branches: Sequence[Branch], sensitivities: Sequence[float], rate: float, *, seed: int
) -> tuple[float, ...]:
    """Greedy from 0: always +0.1 for the branch with the smallest sensitivity times next rate (arXiv 2402.17812).

    The last step is shortened, so that the dropped FLOPs are exactly ``rate`` of all. Of equals the branch with the
    lower rate goes first, then one by chance: in order of depth the early ones would always be the last dropped.
    """
    chance = random.Random(f"{seed}/dropbp/ties")
    ties = [chance.random() for _ in branches]
    rates = [0.0] * len(branches)
    cap, left = max(CAP, rate), rate * sum(b.flops for b in branches)

    def price(i: int) -> tuple[float, float, float]:
        return sensitivities[i] * (rates[i] + STEP), rates[i], ties[i]

    while left > 1e-9 * branches[0].flops:
        i = min((i for i in range(len(rates)) if rates[i] < cap - 1e-9), key=price)
        rise = min(STEP, cap - rates[i], left / branches[i].flops)
        rates[i] += rise
        left -= rise * branches[i].flops
    return whole(branches, rates, rate)


def whole(branches: Sequence[Branch], rates: Sequence[float], rate: float) -> tuple[float, ...]:
    """Rates under which every step keeps the same number of branches of each kind, where such are near enough.

    Then every step costs the same. Small models have no such numbers near: there a step keeps one branch of a kind
    more or less than the next, and only the mean is exact.
    """
    kinds = sorted({b.kind for b in branches})
    of = {kind: [i for i, b in enumerate(branches) if b.kind == kind] for kind in kinds}
    cost = {kind: branches[members[0]].flops for kind, members in of.items()}
    kept = {kind: sum(1 - rates[i] for i in members) for kind, members in of.items()}
    total = sum(b.flops for b in branches)
    first, *others = kinds
    best: tuple[float, dict[str, int]] | None = None
    for count in {math.floor(kept[first]), math.ceil(kept[first])}:
        counts, left = {first: count}, (1 - rate) * total - count * cost[first]
        for kind in others:
            counts[kind] = max(0, min(len(of[kind]), round(left / cost[kind])))
            left -= counts[kind] * cost[kind]
        starved = any(kept[kind] > 1e-9 and not counts[kind] for kind in kinds)
        if not starved and abs(left) <= CLOSE * total and (best is None or abs(left) < best[0]):
            best = abs(left), counts
    if best is None:
        return tuple(rates)
    moved = list(rates)
    for kind, members in of.items():
        for i in members:
            moved[i] = _moved(rates[i], kept[kind], best[1][kind], len(members))
    return tuple(moved)


def _moved(rate: float, kept: float, wanted: int, of: int) -> float:
    """A rate moved so that the kept shares of its kind add up to ``wanted``."""
    if wanted <= kept:
        return 1 - (1 - rate) * wanted / kept if kept else rate
    return rate * (of - wanted) / (of - kept)


def draw(branches: Sequence[Branch], rates: Sequence[float], *, seed: int, step: int) -> tuple[bool, ...]:
    """Which branches a step keeps: each with exactly its own chance, and as many in all as in any other step.

    A systematic draw: the kept shares are laid end to end, kind by kind and shuffled inside a kind, and every point
    of a grid of width one with a random start takes the branch that it falls on. Where nothing that is trained would
    be kept, one such branch is kept all the same.
    """
    chance = random.Random(f"{seed}/dropbp/{step}")  # a text seeds alike on every machine and version
    order = sorted(range(len(branches)), key=lambda i: (branches[i].kind, chance.random()))
    start, laid, before = chance.randrange(_FINE), 0.0, 0
    kept = [False] * len(branches)
    for i in order:
        laid += 1 - rates[i]
        end = round(laid * _FINE)
        kept[i] = (end - start - 1) // _FINE > (before - start - 1) // _FINE
        before = end
    trained = [i for i, b in enumerate(branches) if b.trained]
    if trained and not any(kept[i] for i in trained):
        kept[chance.choice(trained)] = True
    return tuple(kept)


def dropped_share(branches: Sequence[Branch], rates: Sequence[float]) -> float:
    """Share of the branches' backward FLOPs that these rates drop, on average."""
    total = sum(b.flops for b in branches)
    return sum(r * b.flops for b, r in zip(branches, rates, strict=True)) / total
