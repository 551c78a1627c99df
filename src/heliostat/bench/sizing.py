"""How many workers a way of sharing needs for a load within limits: by simulation, started where formulas say. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from heliostat.bench.counting import Case, count
from heliostat.bench.layout import Machine, Pool, pools_of, sized, stations
from heliostat.bench.measured import planned_log
from heliostat.bench.reckoning import Demand, fewest, spread_of
from heliostat.bench.records import Limits, Record, Run
from heliostat.bench.simulator import Service
from heliostat.bench.workloads import Session
from heliostat.serve.router import DECODE

GOOD = 0.95
"""Share of every pool's requests that must keep the limit it is there for."""
MOST = 256
"""Workers up to which a service is simulated event by event."""
ALONE = 24
"""Sessions, one after the other, that tell whether limits can be met at all."""
TRIALS = 24
"""Numbers of workers that are tried upwards before it is given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """What a sharing needs, and what it then does; or why no number of workers is enough."""

    sharing: str
    split: bool
    apart: bool
    counts: Mapping[str, int]
    """Pool -> workers; empty where there are never enough."""
    prefill: int = 0
    decode: int = 0
    both: int = 0
    """Workers that only prefill, only decode, do both."""
    goodput: float | None = None
    """Share of the requests within both limits; None, like the times, where nothing was simulated."""
    ttft: float | None = None
    tpot: float | None = None
    """95 of 100 are below, seconds."""
    tokens: float = 0.0
    """Answer tokens a second."""
    hits: float = 0.0
    batch: float = 0.0
    """Mean rows of a pass that decodes."""
    how: str = "simulated"
    why_not: str = ""

    @property
    def workers(self) -> int:
        return self.prefill + self.decode + self.both


def demand_of(case: Case, asked: Sequence[Session]) -> dict[str, Demand]:
    """What comes in for each member, with every page kept."""
    log = planned_log(asked)
    wall = max(1e-9, log.requests[-1].time - log.requests[0].time)
    found = {}
    whole = count(log, [case], flying=False)[0]
    share = whole.prefill / whole.prompt
    for member in case.rows:
        own = [logged for logged in log.requests if logged.member == member]
        if not own:
            found[member] = Demand(rate=0.0, prompt=0.0, fresh=0.0, answer=0.0)
            continue
        prompt = fmean(logged.prompt_tokens for logged in own)
        found[member] = Demand(
            rate=len(own) / wall,
            prompt=prompt,
            fresh=share * prompt,
            answer=fmean(logged.answer_tokens for logged in own),
            spread=spread_of([logged.prompt_tokens for logged in own]) + 0.25,
        )
    return found


class Sizing:
    """Tries numbers of workers on the same sessions."""

    def __init__(
        self, machine: Machine, case: Case, asked: Sequence[Session], limits: Limits, *, good: float = GOOD
    ) -> None:
        self.machine, self.case, self.asked, self.limits, self.good = machine, case, asked, limits, good
        self.demand = demand_of(case, asked)
        self.simulated = 0
        """How often the sessions were run."""

    def find(self, *, split: bool, apart: bool) -> Sized:
        """The fewest workers of one layout."""
        pools = pools_of(self.case, split=split, apart=apart)
        if why := self._never(pools):
            return Sized(sharing=self.case.name, split=split, apart=apart, counts={}, why_not=why)
        counts = {pool.name: self._start(pool) for pool in pools}
        if sum(counts.values()) > MOST:
            return self.reckoned(split=split, apart=apart)
        for _ in range(TRIALS):
            run, busy = self._run(pools, counts)
            poor = self._poor(pools, run)
            if not poor:
                return self._fewer(pools, counts, run, split=split, apart=apart)
            worst = max(poor, key=lambda name: busy[name])
            counts[worst] += max(1, counts[worst] // 8) if busy[worst] < 0.98 else max(1, counts[worst] // 3)
            if sum(counts.values()) > MOST:
                return self.reckoned(split=split, apart=apart)
        why = f"not met after {TRIALS} trials, the last with {sum(counts.values())} workers"
        return Sized(sharing=self.case.name, split=split, apart=apart, counts={}, why_not=why)

    def reckoned(self, *, split: bool, apart: bool) -> Sized:
        """By formulas alone. Refused where the modules do not fit."""
        pools = pools_of(self.case, split=split, apart=apart)
        for pool in pools:
            self.machine.pages_beside(pool.modules, self.case)
        counts = {
            pool.name: fewest(self.machine, self.case, pool, self.demand, self.limits, most=10**6)
            for pool in pools
        }
        if missing := [name for name, number in counts.items() if number is None]:
            why = f"no number of workers keeps the limits: {', '.join(missing)}, as reckoned by formulas"
            return Sized(
                sharing=self.case.name, split=split, apart=apart, counts={}, how="reckoned", why_not=why
            )
        whole = {name: number or 1 for name, number in counts.items()}
        return replace(self._sized(pools, whole, split=split, apart=apart), how="reckoned")

    def keeps(self, pools: Sequence[Pool], counts: Mapping[str, int]) -> bool:
        """Whether so many workers keep the limits."""
        run, _ = self._run(pools, counts)
        return not self._poor(pools, run)

    def _start(self, pool: Pool) -> int:
        """A few less than formulas say: who has too many would not be told. One where formulas know no number."""
        found = fewest(self.machine, self.case, pool, self.demand, self.limits, most=10**6)
        return 1 if found is None else max(1, round(0.8 * found))

    def _never(self, pools: Sequence[Pool]) -> str:
        """Why not even an idle service keeps the limits; empty: it does."""
        few = self.asked[:ALONE]
        slowly = [replace(session, start=1e5 * number) for number, session in enumerate(few)]
        run, _ = self._run(pools, {pool.name: 1 for pool in pools}, slowly)
        share = fmean(record.meets(self.limits) for record in run.records)
        if share >= self.good:
            return ""
        ttft, tpot = _high(run.records, "ttft"), _high(run.records, "tpot")
        return (
            f"no number of workers keeps the limits: alone in an idle service 95 of 100 requests have a TTFT of up "
            f"to {_seconds(ttft)} (limit {self.limits.ttft:g}) and a TPOT of up to {_seconds(tpot)} (limit "
            f"{self.limits.tpot:g})"
        )

    def _run(
        self, pools: Sequence[Pool], counts: Mapping[str, int], asked: Sequence[Session] | None = None
    ) -> tuple[Run, dict[str, float]]:
        """(what a client saw, how busy each pool was while sessions came)."""
        self.simulated += 1
        made = sized(pools, counts)
        service = Service(stations(self.machine, self.case, made), self.case.rows)
        run = service.run(self.asked if asked is None else asked)
        self._last = service
        busy = {
            pool.name: sum(service.stations[f"{pool.name}.{n}"].tally.busy for n in range(pool.count))
            / (pool.count * service.now)
            for pool in made
        }
        return run, busy

    def _poor(self, pools: Sequence[Pool], run: Run) -> list[str]:
        """Pools whose requests miss a limit that is theirs to keep."""
        found = []
        for pool in pools:
            own = [record for record in run.records if record.member in pool.members]
            if not own:
                continue
            quick = fmean((r.tpot or 0.0) <= self.limits.tpot and r.answered for r in own)
            early = fmean(r.ttft is not None and r.ttft <= self.limits.ttft for r in own)
            # Late first tokens may be the fault of who prefills or of who decodes: the busier one is told.
            if early < self.good or (quick < self.good and DECODE in pool.roles):
                found.append(pool.name)
        return found

    def _fewer(
        self, pools: Sequence[Pool], counts: dict[str, int], run: Run, *, split: bool, apart: bool
    ) -> Sized:
        """Take workers away as long as the limits are kept, round after round: who has fewer asks others later."""
        found = self._sized(pools, counts, split=split, apart=apart, run=run)
        moved = True
        while moved:
            moved = False
            for pool in pools:
                step = max(1, counts[pool.name] // 16)
                while step and counts[pool.name] > 1:
                    trial = counts | {pool.name: counts[pool.name] - min(step, counts[pool.name] - 1)}
                    run, _ = self._run(pools, trial)
                    if self._poor(pools, run):
                        step //= 2
                        continue
                    counts, moved = trial, True
                    found = self._sized(pools, counts, split=split, apart=apart, run=run)
            moved = moved and len(pools) > 1
        return found

    def _sized(
        self,
        pools: Sequence[Pool],
        counts: Mapping[str, int],
        *,
        split: bool,
        apart: bool,
        run: Run | None = None,
    ) -> Sized:
        roles = {"prefill": 0, "decode": 0, "both": 0}
        for pool in pools:
            roles["both" if len(pool.roles) > 1 else pool.roles[0]] += counts[pool.name]
        return Sized(
            sharing=self.case.name,
            split=split,
            apart=apart,
            counts=dict(counts),
            prefill=roles["prefill"],
            decode=roles["decode"],
            both=roles["both"],
            **({} if run is None else self._facts(run)),
        )

    def _facts(self, run: Run) -> dict[str, Any]:
        records = run.records
        wall = max(r.end for r in records) - min(r.scheduled for r in records)
        tallies = [station.tally for station in self._last.stations.values()]
        passes = sum(tally.decode_passes for tally in tallies)
        return {
            "goodput": fmean(record.meets(self.limits) for record in records),
            "ttft": _high(records, "ttft"),
            "tpot": _high(records, "tpot"),
            "tokens": sum(record.tokens for record in records) / wall,
            "hits": sum(r.cached_tokens or 0 for r in records) / sum(r.prompt_tokens or 0 for r in records),
            "batch": sum(tally.decode_rows for tally in tallies) / passes if passes else 0.0,
        }


def _high(records: Sequence[Record], name: str) -> float | None:
    """What 95 of 100 are below; None where nobody has any."""
    found = sorted(value for r in records if (value := getattr(r, name)) is not None)
    return found[int(0.95 * (len(found) - 1))] if found else None


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g} s"
