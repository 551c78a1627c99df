"""What points of ``heliostat bench speculate`` allow to be said: medians, ratios of pairs, verdicts on goals. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

OFF, LOSSLESS = "off", "lossless"
ALWAYS = "lossless, always"
"""As many tokens drafted as are allowed, whatever it costs: beside it stands what the engine's own choice is worth."""
GOAL_FASTER, GOAL_LOSS, GOAL_BATCHES = 1.25, 0.01, (1, 2, 4)
"""Judged rules: times the speed of lossless ones, at most so much accuracy lost; lossless beats none at these batches."""


@dataclass(frozen=True, slots=True)
class Ruled:
    """What one rule came to."""

    rule: str
    accuracy: Mapping[str, float]
    """By data set, mean of the seeds."""
    spread: float
    """Highest minus lowest accuracy of the seeds on the first set; 0 of one."""
    accepted_length: float
    """Tokens for each pass of the speaker that verifies; as many drafted as allowed."""
    accepted: float
    """Share of the drafted tokens."""
    judged: float
    """Share of all tokens that only the rule let pass."""
    speed: Mapping[int, float]
    """Tokens a second by batch, median."""
    over_off: Mapping[int, float]
    """Median of the ratios within a turn."""
    over_lossless: Mapping[int, float]
    drafting: Mapping[int, float]
    """Drafted tokens for each one said, where the engine decides how many."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens a second of every turn, by rule."""

    turns: Sequence[Mapping[str, Mapping[str, float]]]

    def rates(self, rule: str) -> list[float]:
        """Of each turn."""
        return [turn[rule]["tokens"] / turn[rule]["seconds"] for turn in self.turns]

    def median(self, rule: str) -> float:
        """Tokens a second."""
        return median(self.rates(rule))

    def ratio(self, rule: str, other: str) -> float:
        """Median of the ratios of pairs of one turn: what slows a turn slows both."""
        return median(a / b for a, b in zip(self.rates(rule), self.rates(other), strict=True))

    @property
    def switch(self) -> float | None:
        """Of ``lossless``, times the speed of always drafting as much as is allowed; None where that was not measured."""
        return self.ratio(LOSSLESS, ALWAYS) if all(ALWAYS in turn for turn in self.turns) else None

    def drafting(self, rule: str) -> float:
        """Drafted tokens for each one said."""
        return median(turn[rule]["drafted"] / max(1, turn[rule]["tokens"]) for turn in self.turns)


def ruled(found: Mapping[str, Any]) -> list[Ruled]:
    """Every rule, in the order of the measurement."""
    facts, points = found["facts"], found["points"]
    speeds = speeds_of(found)
    made = []
    for rule in facts["rules"]:
        seeds = [seed for seed in range(facts["seeds"]) if f"answers/{seed}/{rule}/told" in points]
        sets = [name for name in ("told", "held out") if f"answers/0/{rule}/{name}" in points]
        each = {name: [points[f"answers/{seed}/{rule}/{name}"] for seed in seeds] for name in sets}
        told = each["told"]
        rights = [one["accuracy"] for one in told]
        made.append(
            Ruled(
                rule,
                {name: fmean(one["accuracy"] for one in ones) for name, ones in each.items()},
                max(rights) - min(rights),
                fmean(one["accepted_length"] for one in told),
                fmean(one["accepted"] for one in told),
                fmean(one["judged"] for one in told),
                {batch: own.median(rule) for batch, own in speeds.items()},
                {batch: own.ratio(rule, OFF) for batch, own in speeds.items()},
                {batch: own.ratio(rule, LOSSLESS) for batch, own in speeds.items()},
                {batch: own.drafting(rule) for batch, own in speeds.items()},
            )
        )
    return made


def speeds_of(found: Mapping[str, Any]) -> dict[int, Speeds]:
    """By batch."""
    facts, points = found["facts"], found["points"]
    return {
        batch: Speeds([points[f"speed/{batch}/{again}"] for again in range(facts["repeats"])])
        for batch in facts["batches"]
    }


def judge_share(found: Mapping[str, Any]) -> float:
    """Of the seconds of ``judged:recall`` at the first batch: a judge's call for each pass that verifies."""
    batch = found["facts"]["batches"][0]
    turns = speeds_of(found)[batch].turns
    answers = found["points"]["answers/0/judged:recall/told"]
    passes = sum(turn["judged:recall"]["tokens"] for turn in turns) / answers["accepted_length"]
    seconds = sum(turn["judged:recall"]["seconds"] for turn in turns)
    return float(passes * found["points"]["judge_seconds"]["8"] / seconds)


def verdicts(rules: Sequence[Ruled]) -> list[str]:
    """The goals, and whether they were met; numbers either way."""
    by_name = {one.rule: one for one in rules}
    exact, lossless = by_name[OFF], by_name[LOSSLESS]
    ratios = {batch: ratio for batch, ratio in lossless.over_off.items() if batch in GOAL_BATCHES}
    shown = ", ".join(f"{ratio:.2f} at batch {batch}" for batch, ratio in ratios.items())
    met = all(ratio > 1 for ratio in ratios.values())
    lines = [f"Lossless faster than none at batches 1 to 4: **{_met(met)}** (times the speed: {shown})."]
    first = min(lossless.speed)
    judged = [one for one in rules if one.rule.startswith("judged")]
    kept = [one for one in judged if exact.accuracy["told"] - one.accuracy["told"] <= GOAL_LOSS]
    best = max(kept or judged, key=lambda one: one.over_lossless[first])
    enough = bool(kept) and best.over_lossless[first] >= GOAL_FASTER
    what = "of those that lose at most a point" if kept else "none loses at most a point; of all"
    lines.append(
        f"Judged at least {GOAL_FASTER:.2f} times lossless at a loss of at most one point, batch {first}: "
        f"**{_met(enough)}** (fastest {what}: `{best.rule}`, {best.over_lossless[first]:.2f} times, "
        f"{100 * best.accuracy['told']:.1f} % right where none gives {100 * exact.accuracy['told']:.1f} %)."
    )
    others = [
        one
        for one in rules
        if one.rule.partition(":")[0] in ("kl", "topk", "entropy")
        and exact.accuracy["told"] - one.accuracy["told"] <= GOAL_LOSS
    ]
    if others:
        rival = max(others, key=lambda one: one.over_lossless[first])
        lines.append(
            f"Of the rules that need no training the fastest within a point is `{rival.rule}`: "
            f"{rival.over_lossless[first]:.2f} times lossless, {100 * rival.accuracy['told']:.1f} % right."
        )
    else:
        lines.append("No rule without training stays within a point.")
    return lines


def _met(met: bool) -> str:
    return "met" if met else "missed"
