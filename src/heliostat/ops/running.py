"""Running sums of values over pages: each full page holds the sum up to its end, everything before it included.

So a page found, fetched or kept carries all that a row behind it needs: a row adds what of its own page it sees. Sums
follow what the pages hold, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.ops.decoding import RowPages

NONE = -1
"""In place of the page before the first."""
Filled = tuple[int, Sequence[int]]
"""Pages that a pass makes full, of one request in order, behind the page before them, or behind NONE."""


@dataclass(frozen=True, slots=True)
class Running:
    """Where the sums of a pass's rows come from, and which pages it makes full."""

    opened: Tensor  # [U] pages that rows stand in
    before: Tensor  # [U] the page before each, or NONE
    of: Tensor  # [T] which of the opened pages each row stands in
    places: Tensor  # [T] at which of its places
    seen: Tensor  # [T] positions that each row sees
    filled: Tensor  # [M] pages that are full after the pass
    first: Tensor  # [C] what each run of them goes on from, a page or NONE
    runs: Tensor  # [C, N] which of the filled, in order; M where there is none
    spots: Tensor  # [M] where in ``runs`` each of them stands, rows laid end to end

    @classmethod
    def of_entries(
        cls,
        entries: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]],
        filled: Sequence[Filled],
        *,
        page_size: int,
        device: torch.device,
    ) -> Running:
        """``entries``: (rows, pages, visible) of each request of a pass; together they name every row once."""
        opened: dict[int, tuple[int, int]] = {}  # page -> number, page before
        found: list[tuple[int, int, int, int]] = []
        for rows, pages, visible in entries:
            for row, seen in zip(rows, visible, strict=True):
                index, place = divmod(seen - 1, page_size)
                before = pages[index - 1] if index else NONE
                number, _ = opened.setdefault(pages[index], (len(opened), before))
                found.append((row, number, place, seen))
        ordered = sorted(found)
        count, wide = sum(len(run) for _, run in filled), max([len(run) for _, run in filled], default=0)
        runs: list[list[int]] = []
        spots: list[int] = []
        for line, (_, run) in enumerate(filled):
            number = len(spots)
            runs.append([*range(number, number + len(run)), *[count] * (wide - len(run))])
            spots += range(line * wide, line * wide + len(run))

        def tensor(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        return cls(
            opened=tensor(list(opened)),
            before=tensor([before for _, before in opened.values()]),
            of=tensor([number for _, number, _, _ in ordered]),
            places=tensor([place for _, _, place, _ in ordered]),
            seen=tensor([seen for *_, seen in ordered]),
            filled=tensor([page for _, run in filled for page in run]),
            first=tensor([before for before, _ in filled]),
            runs=tensor([place for line in runs for place in line]).view(len(runs), wide),
            spots=tensor(spots),
        )

    @classmethod
    def of_rows(cls, rows: RowPages, slots: Tensor, *, page_size: int, scratch: int) -> Running:
        """For rows that each stand alone and write one slot [T] or scratch; in fixed shapes, so it can be recorded."""
        count = torch.arange(slots.shape[0], device=slots.device)
        index = (rows.visible - 1) // page_size
        own = rows.pages.gather(1, index[:, None])[:, 0]
        earlier = rows.pages.gather(1, (index - 1).clamp(min=0)[:, None])[:, 0]
        before = torch.where(index > 0, earlier, NONE)
        full = (slots // page_size == own) & (slots % page_size == page_size - 1)
        return cls(
            opened=own,
            before=before,
            of=count,
            places=(rows.visible - 1) % page_size,
            seen=rows.visible,
            filled=torch.where(full, own, scratch),
            first=before,
            runs=count[:, None],
            spots=count,
        )

    def fill(self, values: Tensor, sums: Tensor) -> None:
        """Put the sums of the pages that are full now in their places; values [P, S, K, D], sums [P, K, D] float32."""
        if not self.filled.numel():
            return
        pages = values[self.filled].float().sum(1)
        lines = torch.cat([pages, pages.new_zeros(1, *pages.shape[1:])])[self.runs]  # [C, N, K, D]
        whole = lines.cumsum(1) + _held(self.first, sums)[:, None]
        sums[self.filled] = whole.flatten(0, 1)[self.spots]

    def __call__(self, values: Tensor, sums: Tensor) -> Tensor:
        """The sum of the values that each row sees, [T, K, D] float32. What a page holds behind a row may be anything."""
        within = values[self.opened].float().cumsum(1)
        return (within + _held(self.before, sums)[:, None])[self.of, self.places]


def _held(pages: Tensor, sums: Tensor) -> Tensor:
    return torch.where((pages != NONE)[:, None, None], sums[pages.clamp(min=0)], 0.0)


def plain_sums(values: Tensor, pages: Sequence[int], seen: int) -> Tensor:
    """The twin of ``Running``: values [P, S, K, D] of the first ``seen`` positions of one request -> [K, D] float64."""
    return values[list(pages)].flatten(0, 1)[:seen].double().sum(0)
