"""Decode passes at fixed shapes: rows are padded, part by part, so that few shapes serve every batch. No torch.

A padded row asks over the scratch page and writes there; so does a row that writes nothing. No request's page is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from heliostat.engine.batch import Pass

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Sizes of a part: wasting little where it is large, few where it is small."""
QUERIES = 2
"""Most rows of one request in such a pass: a token's two, or one. Longer chunks read their pages once for all rows."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What is fixed: one for each graph."""

    weights: str
    parts: tuple[tuple[str | None, int], ...]
    """(adapter or None, rows), in the order of the pass's segments."""
    pages: int
    """Pages of each row."""

    @property
    def rows(self) -> int:
        """Of all parts."""
        return sum(size for _, size in self.parts)

    @property
    def route(self) -> list[tuple[str | None, int, int]]:
        """(adapter, start, stop) of each part."""
        found, start = [], 0
        for adapter, size in self.parts:
            found.append((adapter, start, start := start + size))
        return found


@dataclass(frozen=True, slots=True)
class Filled:
    """A pass laid out: lists of the layout's length, and where the rows of the pass stand."""

    tokens: list[int]
    positions: list[int]
    slots: list[int]
    """Where each row writes to."""
    visible: list[int]
    pages: list[int]
    """Of all rows, end to end."""
    places: list[int]
    """Row of the pass -> row of the layout."""

    @property
    def flat(self) -> list[int]:
        """All that goes to the device, at once."""
        return [*self.tokens, *self.positions, *self.slots, *self.visible, *self.pages]


def layout_of(each: Pass, *, page_size: int) -> Layout | None:
    """The layout that a pass fits in; None where it is no decode pass, or larger than any."""
    if any(len(entry.rows) > QUERIES for entry in each.entries):
        return None
    parts = []
    for segment in each.segments:
        size = next((size for size in ROWS if size >= segment.stop - segment.start), None)
        if size is None:
            return None
        parts.append((segment.adapter, size))
    longest = max(_pages(entry.visible, page_size) for entry in each.entries)
    return Layout(each.weights, tuple(parts), 1 << (longest - 1).bit_length())


def fill(each: Pass, layout: Layout, *, page_size: int, scratch: int) -> Filled:
    """Lay a pass out; ``scratch`` is the page that belongs to nobody."""
    starts = [start for _, start, _ in layout.route]
    places = [
        start + row - segment.start
        for segment, start in zip(each.segments, starts, strict=True)
        for row in range(segment.start, segment.stop)
    ]
    made = Filled(
        tokens=_spread(each.tokens, places, layout.rows, 0),
        positions=_spread(each.positions, places, layout.rows, 0),
        slots=[scratch * page_size] * layout.rows,
        visible=[1] * layout.rows,
        pages=[scratch] * (layout.rows * layout.pages),
        places=places,
    )
    for row, slot in zip(each.write_rows, each.write_slots, strict=True):
        made.slots[places[row]] = slot
    for entry in each.entries:
        pages = entry.pages[: _pages(entry.visible, page_size)]
        for row, visible in zip(entry.rows, entry.visible, strict=True):
            first = places[row] * layout.pages
            made.visible[places[row]] = visible
            made.pages[first : first + len(pages)] = pages
    return made


def _pages(visible: Sequence[int], page_size: int) -> int:
    return -(-max(visible) // page_size)


def _spread(values: Sequence[int], places: Sequence[int], size: int, padding: int) -> list[int]:
    found = [padding] * size
    for place, value in zip(places, values, strict=True):
        found[place] = value
    return found
