"""Hires and lets go simulated workers by the velocity of tokens, as TokenScale does (arXiv 2512.03416). No torch.

The paper measures each stage's velocity beforehand and sizes prefill and decode workers from the rates at which tokens
arrive. Here velocities are reckoned from the costs of a step. Its decode workers that turn to prefilling in a burst are
not there: only workers that are hired take more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from heliostat.bench.counting import Case
from heliostat.bench.layout import Machine, Pool, station
from heliostat.bench.reckoning import Demand, prompt_seconds, step_seconds
from heliostat.bench.records import Limits
from heliostat.bench.simulator import Service
from heliostat.errors import Refused
from heliostat.serve.scaling import Scaling, Velocity

FILLED = 0.8
"""Share of a TPOT limit up to which a decode worker is filled on average; a burst needs the rest."""


def velocity_of(machine: Machine, case: Case, demand: Demand, limits: Limits) -> Velocity:
    """What one worker of each role gets through. Refused where a single request is too slow already."""
    shares = {member: 1 / len(case.rows) for member in case.rows}
    context = demand.prompt + demand.answer / 2
    batch = 0
    for size in range(1, machine.max_running + 1):
        if step_seconds(case, machine.costs, shares, size, context) > FILLED * limits.tpot:
            break
        batch = size
    if not batch:
        raise Refused(
            f"no number of workers keeps a TPOT of {limits.tpot:g} s: one request alone takes longer"
        )
    moving = machine.page_bytes / machine.page_size * machine.costs.byte_seconds
    return Velocity(
        prefill=demand.fresh / prompt_seconds(machine.costs, demand.fresh, demand.prompt),
        decode=batch / step_seconds(case, machine.costs, shares, batch, context),
        network=1 / moving if moving else float("inf"),
    )


@dataclass(slots=True)
class Scaler:
    """A watcher of a service: one pool a role, whose numbers follow what comes in."""

    scaling: Scaling
    machine: Machine
    case: Case
    pools: tuple[Pool, Pool]
    """Who prefills, who decodes."""
    start_seconds: float = 5.0
    """From hiring a worker to its first request."""
    every: float = 1.0
    most: int = 0
    """Workers that were there at most."""
    _made: dict[str, int] = field(default_factory=dict)
    _coming: dict[str, list[float]] = field(default_factory=dict)

    def look(self, service: Service) -> None:
        """Hire at once what is wanted more; let go what is not, those with the least to do first."""
        self.scaling.note(service.now, prompt=service.prompt_tokens, answer=service.answer_tokens)
        wanted = self.scaling.wanted(service.now)
        for pool in self.pools:
            coming = [when for when in self._coming.get(pool.name, []) if when > service.now]
            self._coming[pool.name] = coming
            here = [
                n for n in service.stations if n.partition(".")[0] == pool.name and n not in service.leaving
            ]
            change = wanted[pool.roles[0]] - len(here) - len(coming)
            for _ in range(change):
                number = self._made[pool.name] = self._made.get(pool.name, pool.count) + 1
                service.hire(station(self.machine, self.case, pool, number), after=self.start_seconds)
                coming.append(service.now + self.start_seconds)
            if change < 0:
                for name in sorted(here, key=service.router.outstanding)[: min(-change, len(here) - 1)]:
                    service.let_go(name)
        self.most = max(self.most, len(service.hired))
