"""Passes at fixed shapes: every row of a pass stands in its place, and padding touches nobody's page."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.engine.batch import Entry, Pass, Segment
from heliostat.engine.fixed import ROWS, fill, layout_of

PAGE, SCRATCH = 4, 99
ADAPTERS: list[list[str | None]] = [[None], ["a"], [None, "a"], [None, "a", "b"], ["a", "b"]]


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    """Decode passes: some adapters, one or two rows a request, some rows that only speak."""
    adapters = draw(st.sampled_from(ADAPTERS))
    made, free = Pass("base"), iter(range(90))
    waiting: list[Entry] = []
    for adapter in adapters:
        start = len(made.tokens)
        for _ in range(draw(st.integers(1, 5))):
            row, again = len(made.tokens), draw(st.booleans())
            if again and waiting:  # the second row of a token: it asks, and writes nothing
                entry = waiting.pop()
                entry.rows.append(row)
                entry.visible.append(entry.visible[0])
            else:
                seen = draw(st.integers(1, 20))
                pages = tuple(next(free) for _ in range(-(-seen // PAGE)))
                entry = Entry([row], pages, [seen])
                made.entries.append(entry)
                waiting.append(entry)
                made.write_rows.append(row)
                made.write_slots.append(pages[(seen - 1) // PAGE] * PAGE + (seen - 1) % PAGE)
            made.tokens.append(100 + row)
            made.positions.append(entry.visible[0] - 1)
        made.segments.append(Segment(adapter, start, len(made.tokens)))
    return made


@given(each=passes())
def test_every_row_is_where_its_adapter_is_and_the_rest_is_scratch(each: Pass) -> None:
    layout = layout_of(each, page_size=PAGE)
    assert layout is not None and layout.rows >= len(each.tokens)
    found = fill(each, layout, page_size=PAGE, scratch=SCRATCH)
    assert len(found.flat) == layout.rows * (4 + layout.pages)
    assert len(set(found.places)) == len(each.tokens)
    for segment, (adapter, start, stop) in zip(each.segments, layout.route, strict=True):
        assert adapter == segment.adapter
        assert all(start <= place < stop for place in found.places[segment.start : segment.stop])
    writing = dict(zip(each.write_rows, each.write_slots, strict=True))
    for row, place in enumerate(found.places):
        assert (found.tokens[place], found.positions[place]) == (each.tokens[row], each.positions[row])
        assert found.slots[place] == writing.get(row, SCRATCH * PAGE)
    for entry in each.entries:
        for row, seen in zip(entry.rows, entry.visible, strict=True):
            first = found.places[row] * layout.pages
            assert found.visible[found.places[row]] == seen
            assert tuple(found.pages[first : first + len(entry.pages)]) == entry.pages
    padding = set(range(layout.rows)) - set(found.places)
    assert {found.slots[place] // PAGE for place in padding} <= {SCRATCH}
    for place in padding:
        pages = found.pages[place * layout.pages : (place + 1) * layout.pages]
        assert set(pages) == {SCRATCH} and found.visible[place] == 1


def decode(rows: int, seen: int = 1) -> Pass:
    pages = -(-seen // PAGE)
    entries = [Entry([row], tuple(range(pages)), [seen]) for row in range(rows)]
    return Pass("base", [0] * rows, [0] * rows, segments=[Segment(None, 0, rows)], entries=entries)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 4), (8, 8), (9, 16), (33, 48), (128, 128)])
def test_batches_have_few_sizes(rows: int, size: int) -> None:
    layout = layout_of(decode(rows), page_size=PAGE)
    assert layout is not None and layout.parts == ((None, size),)


@pytest.mark.parametrize(("seen", "pages"), [(1, 1), (4, 1), (5, 2), (9, 4), (17, 8), (33, 16)])
def test_pages_double(seen: int, pages: int) -> None:
    layout = layout_of(decode(2, seen), page_size=PAGE)
    assert layout is not None and layout.pages == pages


def test_long_chunks_and_large_batches_have_none() -> None:
    assert layout_of(decode(ROWS[-1] + 1), page_size=PAGE) is None
    chunk = Pass(
        "base",
        [0] * 3,
        [0, 1, 2],
        segments=[Segment(None, 0, 3)],
        entries=[Entry([0, 1, 2], (0,), [1, 2, 3])],
    )
    assert layout_of(chunk, page_size=PAGE) is None
