"""Sets of workers as bits of one number, ordered by how much each has to do: a choice among a thousand in a few steps.

No torch. Worker number n is bit 1 << n.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

LEVELS = 96
_EXACT = 16
_FINE = 8
"""Levels for each doubling beyond: what is alike differs by less than a tenth."""


def level_of(work: int) -> int:
    """The work itself while it is little, then so many levels for each doubling."""
    if work <= _EXACT:
        return work
    return min(LEVELS - 1, _EXACT + math.ceil(_FINE * math.log2(work / _EXACT)))


def lowest(bits: int) -> int:
    """The number of the lowest worker of a set that is not empty."""
    return (bits & -bits).bit_length() - 1


class Levels:
    """Workers by level. What changes is one worker's place; what is asked is the least of any set."""

    def __init__(self) -> None:
        self._at = [0] * LEVELS
        self._level: dict[int, int] = {}

    def put(self, place: int, work: int) -> None:
        """Worker number ``place`` has so much to do now."""
        level, before = level_of(work), self._level.get(place)
        if level == before:
            return
        if before is not None:
            self._at[before] ^= 1 << place
        self._level[place] = level
        self._at[level] |= 1 << place

    def drop(self, place: int) -> None:
        """There is no such worker any more."""
        if (level := self._level.pop(place, None)) is not None:
            self._at[level] ^= 1 << place

    def ascending(self, among: int) -> Iterator[int]:
        """Those of ``among`` with the least to do, then those with more, and so on."""
        for bits in self._at:
            if here := bits & among:
                yield here


class Turn:
    """Takes turns among those that are alike."""

    def __init__(self) -> None:
        self._last = -1

    def one(self, among: int) -> int:
        """A worker's number out of a set that is not empty: the next after the last one chosen."""
        later = among >> (self._last + 1) << (self._last + 1)
        self._last = lowest(later or among)
        return self._last
