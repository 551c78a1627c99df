"""What is compared, fixed beforehand: lengths, loads, pools, and which points a comparison is made of. No torch.

The pool is what the papers' gains rest on, so its size is no free choice: as many tokens as IN_FLIGHT sessions have to
keep in the system that has to keep least, times a number of POOLS. Every system gets the same pages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from heliostat.bench.counting import PAGE, Counted, count
from heliostat.bench.measured import planned_log
from heliostat.bench.records import Limits
from heliostat.bench.systems import System
from heliostat.bench.workloads import POOLS, Lengths, Load, Session, prompt_ids, sessions
from heliostat.errors import Refused
from heliostat.family import choose

LENGTHS = Lengths(context=192, role=8, answer=8, observation=32)
"""Read to said like 35 to 1, as in the papers' agents, and short enough for 200 sessions a point on two cores."""
LOAD = Load(
    members=("-",), lengths=LENGTHS, turns=2, role_place="kept", assignment="rotate", pause=0.05, sessions=200
)
"""Each call goes to the next member, and what a role was told stays in the context, so that answers may come back."""
LOADS = (0.5, 0.8, 1.0, 1.2)
"""Of the baseline's own peak throughput."""
LIMITS = Limits(ttft=1.0, tpot=0.1)
IN_FLIGHT = 16
"""Sessions whose keys and values a pool of size ``even`` holds once."""
CAPS = (4, 8, 12, 16, 32)
"""Sessions in flight that are tried; the others wait outside, and that time counts. The last: twice what a pool holds."""
ROUNDS = 5
SATURATED = 48
"""Sessions of one run that finds a peak: three times those in flight, so that beginning and end weigh little."""
VARIED = 32
"""Sessions of one run that only compares: caps, variants."""
PILOT = 12
"""Sessions of one run that only chooses a cap."""
APART = 7919
"""Between the seeds of two points: none finds what another left."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A comparison with one thing changed; its peaks alone are measured."""

    name: str
    load: Mapping[str, Any] = field(default_factory=dict)
    pool: str | None = None


ONE_MEMBER = Variant("one member a session", {"switch": 0.0})
ROLE_FIRST = Variant("roles in front", {"role_place": "first"})
NO_HELP = (ONE_MEMBER, ROLE_FIRST)
"""Where there is nothing to share: measured every time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Systems under the same sessions. The first system is the baseline. Raises Refused for what cannot be."""

    systems: tuple[System, ...]
    load: Load
    """Its rate is set point by point."""
    shape: str = "24M"
    pool: str = "even"
    loads: tuple[float, ...] = LOADS
    rounds: int = ROUNDS
    caps: tuple[int, ...] = CAPS
    saturated: int = SATURATED
    varied: int = VARIED
    pilot: int = PILOT
    """0: the cap of the peak is kept."""
    limits: Limits = LIMITS
    variants: tuple[Variant, ...] = NO_HELP

    def __post_init__(self) -> None:
        for pool in (self.pool, *(variant.pool for variant in self.variants if variant.pool)):
            choose(pool, POOLS, what="pool")
        if not self.loads or min(self.loads) <= 0 or max(self.loads) > 10:
            raise Refused(
                f"loads are {self.loads}; each must be above 0, at most 10 times the baseline's peak"
            )

    @property
    def baseline(self) -> System:
        return self.systems[0]

    def changed(self, variant: Variant) -> Comparison:
        """With one thing changed."""
        return replace(self, load=replace(self.load, **variant.load), pool=variant.pool or self.pool)

    def sessions(self, number: int, *, rate: float = 1.0, how_many: int | None = None) -> list[Session]:
        """Those of the point of this number, the same for every system."""
        seed = self.load.seed + APART * number
        wanted = self.load.sessions if how_many is None else how_many
        return sessions(replace(self.load, rate=rate, seed=seed, sessions=wanted))

    def at_once(self, number: int, how_many: int) -> list[Session]:
        """Sessions that are all due at the beginning: how many run is the cap's to say."""
        return [replace(session, start=0.0) for session in self.sessions(number, how_many=how_many)]

    def counted(self, sample: Sequence[Session]) -> dict[str, Counted]:
        """What each system has to run and keep of these sessions, with every page kept."""
        cases = [system.case(self.load.members) for system in self.systems]
        return {found.case: found for found in count(planned_log(sample), cases, flying=False)}

    def pages(self) -> int:
        """Of every system's pool."""
        sample = self.sessions(0, how_many=50)
        least = min(found.kept for found in self.counted(sample).values()) / len(sample)
        room = 4 * math.ceil(self.longest() / PAGE)
        return max(math.ceil(POOLS[self.pool] * IN_FLIGHT * least / PAGE), room)

    def longest(self) -> int:
        """Tokens of the longest of many requests; others may be a little longer."""
        sample = self.sessions(0, how_many=50)
        return max(len(prompt_ids(c, {})) + c.answer_tokens for s in sample for c in s.calls)

    @property
    def points(self) -> int:
        """How many there are."""
        systems, pilots = len(self.systems), len(self.caps) * (self.pilot > 0)
        peaks = self.rounds * (1 + len(self.variants))
        return systems * (len(self.caps) + peaks + len(self.loads)) + pilots * len(self.loads)

    def seconds(self, session: float) -> float:
        """About how long all points take, where a session of the baseline takes so long in a full machine."""
        systems = len(self.systems)
        peaks = systems * self.rounds * (self.saturated + self.varied * len(self.variants))
        peaks += systems * len(self.caps) * self.varied
        loads = sum(
            (systems * self.load.sessions + self.pilot * len(self.caps) * (self.pilot > 0)) / load
            for load in self.loads
        )
        return session * (peaks + loads)


def quick(comparison: Comparison) -> Comparison:
    """Of the same kind and a minute long: no 95th percentiles, and only the baseline's peak load."""
    return replace(
        comparison,
        load=replace(comparison.load, sessions=16),
        loads=(1.0,),
        caps=(4, 16),
        saturated=16,
        varied=16,
        pilot=0,
        variants=(),
    )
