"""Who answers to which name: members, their versions, shares of a canary, requests in flight. No torch, no files.

The names that requests ask for are public; the names in a version's row are the engine's, and carry digests, so
that two versions of a member stand side by side and a request ends on the one it began with.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from heliostat.errors import Refused
from heliostat.family import Row

MARK = "#"
"""Stands between a module's name and the beginning of its digest; no name of a family has it."""


class Unknown(Refused):
    """A name that nobody here answers to."""


@dataclass(frozen=True, slots=True)
class Version:
    """One member as it was when it was loaded."""

    member: str
    row: Row
    """Over names of modules in the engine."""
    digests: Mapping[str, str] = field(hash=False)
    """The engine's digest of each module of the row, whole."""
    source: str
    """What the family calls it: the member itself, or another one that stands in for a newer version."""
    number: int = 0

    @property
    def name(self) -> str:
        """The name that asks for exactly this version: ``math@v2``."""
        return f"{self.member}@v{self.number}"

    @property
    def fingerprint(self) -> str:
        """A short name of the weights and of who does what."""
        row = self.row
        parts = (row.prompt_writer, row.answer_writer, row.speaker, row.first_speaker)
        told = "|".join(self.digests[name] for name in parts)
        return hashlib.sha256(told.encode()).hexdigest()[:12]


@dataclass(slots=True)
class Seat:
    """A member's version now, and the one that is tried beside it on a share of the requests."""

    current: Version
    canary: Version | None = None
    share: float = 0.0
    credit: float = 0.0

    def next(self) -> Version:
        """Whose turn it is: of a hundred requests exactly the share goes to the canary, evenly spread."""
        if self.canary is None:
            return self.current
        self.credit += self.share
        if self.credit < 1 - 1e-9:
            return self.current
        self.credit -= 1
        return self.canary

    @property
    def versions(self) -> tuple[Version, ...]:
        """Both, or the one there is."""
        return (self.current,) if self.canary is None else (self.current, self.canary)


@dataclass(slots=True)
class Roster:
    """The members that are served. One thread uses it."""

    seats: dict[str, Seat] = field(default_factory=dict)
    _flying: Counter[Version] = field(default_factory=Counter)
    _numbers: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[str]:
        return iter(self.seats)

    def __contains__(self, member: object) -> bool:
        return member in self.seats

    def public(self) -> dict[str, Version]:
        """Every name that a request may ask for, and the version that answers to it first."""
        found = {member: seat.current for member, seat in self.seats.items()}
        return found | {v.name: v for seat in self.seats.values() if seat.canary for v in seat.versions}

    def seat(self, member: str) -> Seat:
        """A member's seat; Unknown where it has none, never another's."""
        if member not in self.seats:
            raise Unknown(f"no member {member!r} is served; there is: {', '.join(sorted(self)) or 'none'}")
        return self.seats[member]

    def find(self, name: str) -> Version:
        """The version that a name means; Unknown where it means none."""
        if name in self.seats:
            return self.seats[name].current
        versions = self.seat(name.partition("@")[0]).versions
        for version in versions:
            if version.name == name:
                return version
        raise Unknown(f"no version {name!r} is served; there is: {', '.join(v.name for v in versions)}")

    def choose(self, name: str) -> Version:
        """The version that answers the next request for ``name``: now and then the canary."""
        return self.seats[name].next() if name in self.seats else self.find(name)

    def add(self, version: Version) -> Version:
        """Serve a member that was not served."""
        if version.member in self.seats:
            raise Refused(f"{version.member!r} is served already: roll it to a newer version, or unload it")
        self.seats[version.member] = Seat(numbered := self._numbered(version))
        return numbered

    def try_out(self, version: Version, *, share: float) -> Version:
        """Give a newer version a share of a member's requests; the same version again changes its share."""
        if not 0 < share <= 1:
            raise Refused(f"share is {share!r}; allowed is above 0 to 1 (0.1: one request of ten)")
        seat = self.seat(version.member)
        if _same(version, seat.current):
            raise Refused(f"{version.member!r} is served in this version already: there is nothing to try")
        if seat.canary is None or not _same(version, seat.canary):
            seat.canary, seat.credit = self._numbered(version), 0.0
        seat.share = share
        return seat.canary

    def roll(self, version: Version) -> Version:
        """Make a version the member's only one; requests in flight end on the one they began with."""
        seat = self.seat(version.member)
        known = next((v for v in reversed(seat.versions) if _same(v, version)), None)
        self.seats[version.member] = Seat(known or self._numbered(version))
        return self.seats[version.member].current

    def call_off(self, member: str) -> None:
        """End a member's canary."""
        seat = self.seat(member)
        if seat.canary is None:
            raise Refused(f"{member!r} has no canary")
        self.seats[member] = Seat(seat.current)

    def drop(self, member: str) -> None:
        """Answer to this name no more; requests in flight still end."""
        self.seat(member)
        del self.seats[member]

    def begin(self, version: Version) -> None:
        """A request of this version is in flight."""
        self._flying[version] += 1

    def end(self, version: Version) -> None:
        """It is not any more."""
        assert self._flying[version] > 0, version.name
        self._flying[version] -= 1
        if not self._flying[version]:
            del self._flying[version]

    def flying(self, version: Version) -> int:
        """Requests of this version in flight."""
        return self._flying[version]

    @property
    def all_flying(self) -> int:
        """Requests of any version in flight."""
        return self._flying.total()

    def needed(self) -> set[str]:
        """The engine's modules that somebody still needs, served or in flight."""
        served = {v for seat in self.seats.values() for v in seat.versions}
        return {name for version in served | set(self._flying) for name in version.row.modules}

    def _numbered(self, version: Version) -> Version:
        self._numbers[version.member] += 1
        return replace(version, number=self._numbers[version.member])


def _same(one: Version, other: Version) -> bool:
    return one.row == other.row and dict(one.digests) == dict(other.digests)


def module_name(name: str, digest: str) -> str:
    """The engine's name of a family's module: ``math.own#0123456789ab``."""
    return f"{name}{MARK}{digest[:12]}"


def family_name(module: str) -> str:
    """The family's name of an engine's module, for people."""
    return module.partition(MARK)[0]
