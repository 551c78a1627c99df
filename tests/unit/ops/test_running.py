"""Running sums over pages against adding up what the pages hold: any pages, chunks of any length, rows in any order."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.ops.decoding import RowPages
from heliostat.ops.running import NONE, Running, plain_sums

SLOTS, PAGES, GROUPS, WIDTH = 4, 24, 2, 3


@st.composite
def stories(draw: st.DrawFn) -> list[list[int]]:
    """For some requests, the lengths of the chunks that they are written in."""
    return [
        draw(st.lists(st.integers(1, 11), min_size=1, max_size=4)) for _ in range(draw(st.integers(1, 3)))
    ]


def some(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@given(stories(), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_sums_are_those_of_the_values_that_are_seen(lengths: list[list[int]], seed: int) -> None:
    """Chunk after chunk; what was in a page before it is written is NaN, and each chunk's last row asks twice."""
    dice = random.Random(seed)
    numbers = dice.sample(range(200), 40)
    count = 200
    values = torch.full((count, SLOTS, GROUPS, WIDTH), torch.nan)
    sums = torch.full((count, GROUPS, WIDTH), torch.nan)
    requests = []
    for own in lengths:
        need = -(-sum(own) // SLOTS)
        requests.append(([numbers.pop() for _ in range(need)], own))
    done = [0] * len(requests)
    for turn in range(max(len(own) for _, own in requests)):
        entries, filled, rows = [], [], 0
        wanted: dict[int, tuple[list[int], int]] = {}
        for number, (pages, own) in enumerate(requests):
            if turn >= len(own):
                continue
            start, stop = done[number], done[number] + own[turn]
            done[number] = stop
            for place in range(start, stop):
                values[pages[place // SLOTS], place % SLOTS] = some(
                    GROUPS, WIDTH, seed=seed + 97 * place + number
                )
            seen = [*range(start + 1, stop + 1), stop]
            entries.append((list(range(rows, rows + len(seen))), pages, seen))
            wanted |= {rows + i: (pages, visible) for i, visible in enumerate(seen)}
            rows += len(seen)
            first, last = start // SLOTS, stop // SLOTS
            if first < last:
                filled.append((pages[first - 1] if first else NONE, pages[first:last]))
        running = Running.of_entries(entries, filled, page_size=SLOTS, device=torch.device("cpu"))
        running.fill(values, sums)
        got = running(values, sums)
        for row, (pages, visible) in wanted.items():
            close(got[row], plain_sums(values, pages, visible))
            assert int(running.seen[row]) == visible
        for _, run in filled:
            for page in run:
                pages = next(own for own, _ in requests if page in own)
                close(sums[page], plain_sums(values, pages, (pages.index(page) + 1) * SLOTS))


@given(st.lists(st.tuples(st.integers(1, 11), st.booleans()), min_size=1, max_size=6), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_rows_that_stand_alone_need_no_lists(rows: list[tuple[int, bool]], seed: int) -> None:
    """(what a row sees, whether it writes there): those that do not, write to scratch, as padding does."""
    scratch, wide = 3 * len(rows), 3
    values = some(scratch + 1, SLOTS, GROUPS, WIDTH, seed=seed)
    sums = torch.full((scratch + 1, GROUPS, WIDTH), torch.nan)
    pages, slots = [], []
    for number, (seen, writes) in enumerate(rows):
        own = list(range(wide * number, wide * number + wide))
        for index in range((seen - 1) // SLOTS):  # pages before the last are full
            sums[own[index]] = plain_sums(values, own, (index + 1) * SLOTS).float()
        pages.append(own)
        last = seen - 1
        slots.append(own[last // SLOTS] * SLOTS + last % SLOTS if writes else scratch * SLOTS)
    visible = torch.tensor([seen for seen, _ in rows])
    before = sums.clone()
    running = Running.of_rows(
        RowPages(torch.tensor(pages), visible), torch.tensor(slots), page_size=SLOTS, scratch=scratch
    )
    running.fill(values, sums)
    got = running(values, sums)
    for row, (seen, writes) in enumerate(rows):
        close(got[row], plain_sums(values, pages[row], seen))
        page = pages[row][(seen - 1) // SLOTS]
        if writes and seen % SLOTS == 0:
            close(sums[page], plain_sums(values, pages[row], seen))
        else:
            assert torch.equal(sums[page].isnan(), before[page].isnan())
