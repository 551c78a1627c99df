"""Workers for a way of sharing: who hosts what and plays which part, and how many pages each has. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from heliostat.bench.costs import Costs
from heliostat.bench.counting import PAGE, Case
from heliostat.bench.station import Station
from heliostat.engine.batch import Run
from heliostat.errors import Refused
from heliostat.serve.protocol import Described, Role
from heliostat.serve.router import DECODE, PREFILL, ROLES

MOST_RUNNING = 64
CREDIT = 16
"""Both as a worker has them where nobody says otherwise."""
PLENTY = 2**20
"""Pages that no log fills; as many as a small model leaves room for on a GPU would not be counted in memory."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Workers that are alike."""

    name: str
    roles: tuple[Role, ...]
    modules: tuple[str, ...]
    members: tuple[str, ...]
    """Whose requests they can take."""
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What every worker runs on. ``room`` is what it has for weights and pages; None: there are always ``pages``."""

    name: str
    costs: Costs
    page_bytes: int
    weights_bytes: int = 0
    """Of a whole module; an adapter takes ``adapter_bytes``."""
    adapter_bytes: int = 0
    room: int | None = None
    pages: int = 4096
    max_length: int = 32_768
    max_running: int = MOST_RUNNING
    page_size: int = PAGE

    def pages_beside(self, modules: Sequence[str], case: Case) -> int:
        """Pages that fit beside modules. Refused where these alone do not, or where no page does."""
        if self.room is None:
            return self.pages
        weights = {case.weights.get(name, name) for name in modules}
        riding = sum(name in case.weights for name in modules)
        left = self.room - len(weights) * self.weights_bytes - riding * self.adapter_bytes
        if left < self.page_bytes * (self.max_running + 1):
            taken = (self.room - left) / 2**30
            raise Refused(
                f"{len(weights)} modules of {self.weights_bytes / 2**30:.1f} GiB do not fit {self.name}: it has room "
                f"for {self.room / 2**30:.1f} GiB, they take {taken:.1f} and leave none for pages. Take a GPU with "
                "more memory, a smaller model, or fewer members"
            )
        return min(left // self.page_bytes, PLENTY)


def runs_of(case: Case) -> dict[str, Run]:
    """How each module of a case runs."""
    names = {name for row in case.rows.values() for name in row.modules}
    return {name: (case.weights.get(name, name), name if name in case.weights else None) for name in names}


def modules_of(case: Case, member: str, roles: Sequence[Role]) -> tuple[str, ...]:
    """Modules that a member's requests need of a worker with these roles."""
    row = case.rows[member]
    writing = (row.prompt_writer,) if PREFILL in roles else ()
    answering = (row.answer_writer, row.speaker) if DECODE in roles else ()
    return tuple(dict.fromkeys((*writing, *answering)))


def pools_of(case: Case, *, split: bool, apart: bool) -> list[Pool]:
    """One worker of each kind that a case needs.

    ``split``: workers either prefill or decode. ``apart``: members whose modules of a role have no weights in common
    have workers of their own; else every worker of a role hosts all members'.
    """
    found = []
    for roles in [(PREFILL,), (DECODE,)] if split else [ROLES]:
        groups: dict[frozenset[str], list[str]] = {}
        for member in case.rows:
            weights = frozenset(case.weights.get(n, n) for n in modules_of(case, member, roles))
            groups.setdefault(weights if apart else frozenset(), []).append(member)
        word = roles[0] if split else "worker"
        for number, members in enumerate(groups.values()):
            modules = dict.fromkeys(n for m in members for n in modules_of(case, m, roles))
            name = f"{word}-{number}" if len(groups) > 1 else word
            found.append(Pool(name, roles, tuple(modules), tuple(members)))
    return found


def sized(pools: Sequence[Pool], counts: Mapping[str, int]) -> list[Pool]:
    """The same pools with so many workers."""
    return [replace(pool, count=counts[pool.name]) for pool in pools]


def station(machine: Machine, case: Case, pool: Pool, number: int) -> Station:
    """One worker of a pool."""
    offer = Described(
        worker=f"{pool.name}.{number}",
        incarnation="simulated",
        engine="simulated",
        modules={name: name for name in pool.modules},
        roles=pool.roles,
        fit="",
        page_size=machine.page_size,
        dtype="",
        pages=machine.pages_beside(pool.modules, case),
        page_bytes=machine.page_bytes,
        max_length=machine.max_length,
        max_running=machine.max_running,
        credit=CREDIT,
        hands=True,
    )
    return Station(offer, runs_of(case), machine.costs)


def stations(machine: Machine, case: Case, pools: Sequence[Pool]) -> list[Station]:
    """All workers of all pools."""
    return [station(machine, case, pool, number) for pool in pools for number in range(pool.count)]
