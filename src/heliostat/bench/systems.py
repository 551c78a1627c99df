"""What is set beside each other: every system is the same engine, and differs by its family's table alone. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heliostat.bench.counting import Case
from heliostat.errors import Refused
from heliostat.family import BASE, SHARINGS, Row, choose

WHOLE = "whole"
"""A member's own module is a whole model; else the Linears that its adapter sits on (``Sharing.targets``)."""


@dataclass(frozen=True, slots=True)
class System:
    """A row for every member, and what a member's own module is."""

    name: str
    sharing: str
    """The line of SHARINGS."""
    kind: str
    """``whole``, or the Linears of an adapter."""
    told: str

    def own(self, member: str) -> str:
        """Name of a member's own module; systems of one kind have it in common."""
        return f"{member}.{self.kind}"

    def rows(self, members: Sequence[str]) -> dict[str, Row]:
        """The row of each member."""
        return {member: SHARINGS[self.sharing].instantiate(self.own(member)) for member in members}

    def weights(self, module: str) -> str:
        """Name of the weights that run a module."""
        return module if self.kind == WHOLE or module == BASE else BASE

    def case(self, members: Sequence[str]) -> Case:
        """As ``counting`` takes it."""
        rows = self.rows(members)
        names = {name for row in rows.values() for name in row.modules}
        return Case(self.name, rows, {m: self.weights(m) for m in names if self.weights(m) != m})


SYSTEMS: Mapping[str, System] = {
    system.name: system
    for system in (
        System("independent", "independent", WHOLE, "a whole model for each member, all in one process"),
        System("multilora", "independent", "all", "an adapter for each member on one base, a cache for each"),
        System("sun", "sun", WHOLE, "a prompt writer for each member, one speaker"),
        System("prefillshare", "prefillshare", WHOLE, "one prompt writer, a speaker for each member"),
        System("icarus", "icarus", SHARINGS["icarus"].targets, "one writer, an adapter for each speaker"),
    )
}


def systems_named(names: str) -> list[System]:
    """``independent,sun`` as systems, the first being what the others are compared with."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    found = [choose(name, SYSTEMS, what="system") for name in wanted]
    if len(found) < 2 or len(set(wanted)) < len(wanted):
        raise Refused(f"compare is {names!r}; give two systems or more, each once: independent,sun")
    return found


def member_names(count: int) -> tuple[str, ...]:
    """``m1`` to ``mN``."""
    return tuple(f"m{number + 1}" for number in range(count))


def counts(text: str, name: str = "members") -> list[int]:
    """``2,4,8`` as numbers, each once. Raises Refused for less than 1, or more than roles can be told apart for."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise Refused(f"{name} is {text!r}; it must be whole numbers with commas between: 2,4,8") from None
    if strange := [count for count in found if not 1 <= count <= 64]:
        raise Refused(f"{name} is {strange[0]}; allowed is 1 to 64")
    return list(dict.fromkeys(found))


def rank(width: int) -> int:
    """Of an adapter: 128 at a width of 4096 as the papers have it, scaled, and the next power of two."""
    return max(8, 1 << (width // 32 - 1).bit_length())
