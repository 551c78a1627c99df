"""What decoding side by side comes to: cases, how requests fall on members, ratios over rounds. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from statistics import median
from typing import Any

from heliostat.bench.measured import steps
from heliostat.bench.statistics import paired_ratio
from heliostat.bench.workloads import popularity_named
from heliostat.errors import Refused

RUNNING = (1, 2, 3, 4)
"""Requests a member, on average."""
PROMPT, STEPS = 224, 32
"""Tokens of each prompt, and timed tokens of each answer, where nothing else is said."""
LONG = 1536
"""Tokens of a long prompt: attention does not batch."""
MANY = 64
"""Requests at once that fill every member's own batch."""
MOST = 256


@dataclass(frozen=True, slots=True)
class Case:
    """So many requests at once."""

    members: int
    running: int
    """A member, on average."""
    popularity: str = "uniform"
    prompt: int = PROMPT
    steps: int = STEPS
    less: bool = False
    """Where there is less to gain, or nothing."""

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.members} members, {self.running} running each, {self.popularity}, prompts of {self.prompt}"

    def counts(self) -> list[int]:
        """Requests of each member: as popularity has it, rounded by largest remainders."""
        exponent, total = popularity_named(self.popularity), self.members * self.running
        weights = [(place + 1) ** -exponent for place in range(self.members)]
        shares = [total * weight / sum(weights) for weight in weights]
        found = [int(share) for share in shares]
        rest = sorted(range(self.members), key=lambda place: (found[place] - shares[place], place))
        for place in rest[: total - sum(found)]:
            found[place] += 1
        return found


def cases(members: Sequence[int], popularities: Sequence[str], running: Sequence[int]) -> list[Case]:
    """Every mix; then where there is less to gain: one member alone, long prompts, batches that are full anyway."""
    made = [
        Case(count, each, popularity) for count in members for popularity in popularities for each in running
    ]
    if (most := max(case.members * case.running for case in made)) > MOST:
        raise Refused(f"{most} requests at once; allowed is up to {MOST}: fewer members, or fewer running")
    first = members[0]
    less = [
        Case(1, running[-1], less=True),
        Case(first, 1, prompt=LONG, less=True),
        Case(first, max(1, MANY // first), less=True),
    ]
    names = {case.name for case in made}
    return [*made, *(case for case in less if case.name not in names)]


def decoded(case: Case, systems: Sequence[str], points: Mapping[str, Sequence[Any]]) -> dict[str, Any] | None:
    """What is said of a case; None where a system has no round yet."""
    whole = min(len(points[name]) for name in systems)
    if not whole:
        return None
    rates = {name: [_rate(point) for point in points[name][:whole]] for name in systems}
    base = rates[systems[0]]
    return {
        "case": {**asdict(case), "name": case.name, "counts": case.counts()},
        "systems": {
            name: {
                "tokens_a_second": rates[name],
                "median": median(rates[name]),
                "ratio": paired_ratio(rates[name], base).to_json(),
                "tpot": median(median(point["seconds"]) for point in points[name][:whole]),
                "tpot_steps": steps(
                    list(chain.from_iterable(point["seconds"] for point in points[name][:whole]))
                ),
                "prefill": median(point["prefill"] for point in points[name][:whole]),
            }
            for name in systems
        },
    }


def _rate(point: Any) -> float:
    """Tokens a second over the timed steps."""
    return float(point["requests"] * len(point["seconds"]) / sum(point["seconds"]))
