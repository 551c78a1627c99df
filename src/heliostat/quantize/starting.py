"""Where the fit of one weight starts: scales of its groups, and k-means over its vectors divided by them."""

from __future__ import annotations

import torch
from torch import Tensor

from heliostat.ops.codebook_format import ENTRIES, Format

ROUNDS = 25
"""Of k-means, at most."""
ALIKE = 1e-5
"""Vectors of length 1 that differ by less are one direction."""
CHUNK = 2**24
"""Distances that are held at once."""


def start(weight: Tensor, format: Format, chance: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [M, S, m] int64, codebooks [m, 256, v], scales [M, groups]) for a weight [M, K], float32.

    Scales are the root mean squares of the groups, and each further codebook fits what the ones before left (AQLM,
    arXiv 2401.06118). A weight of no more than 256 directions is taken apart into them and its scales exactly.
    """
    found = _directions(weight, format)
    if found is not None:
        return found
    groups = grouped(weight, format)  # [M, G, g]
    scales = groups.pow(2).mean(-1).sqrt()
    left = (groups / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).reshape(-1, format.v)
    codes, books = [], []
    for _ in range(format.m):
        book, code = k_means(left, chance)
        left = left - book[code]
        books.append(book)
        codes.append(code.view(weight.shape[0], -1))
    return torch.stack(codes, -1), torch.stack(books), scales


def grouped(weight: Tensor, format: Format) -> Tensor:
    """[M, K] -> [M, groups, numbers of a group]; the format divides K."""
    return weight.unflatten(1, (format.groups(weight.shape[1]), -1))


def k_means(vectors: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """(centres [256, v], which one [N] int64) of vectors [N, v]; begun as k-means++ does, the same for the same chance."""
    centres = _spread(vectors, chance)
    nearest = _nearest(vectors, centres)
    for _ in range(ROUNDS):
        count = torch.bincount(nearest, minlength=ENTRIES)
        total = torch.zeros_like(centres).index_add_(0, nearest, vectors)
        centres = torch.where(count[:, None] > 0, total / count.clamp_min(1)[:, None], centres)
        again = _nearest(vectors, centres)
        if torch.equal(again, nearest):
            break
        nearest = again
    return centres, nearest


def _spread(vectors: Tensor, chance: torch.Generator) -> Tensor:
    """First centres: each drawn with the squared distance to those before it as its weight."""
    first = torch.randint(len(vectors), (1,), generator=chance)
    picked, far = [vectors[first]], (vectors - vectors[first]).pow(2).sum(1)
    for _ in range(ENTRIES - 1):
        reach = far.cumsum(0)
        if reach[-1] <= 0:  # fewer vectors than centres: the rest stands for nothing
            picked.append(torch.zeros_like(picked[0]))
            continue
        at = torch.searchsorted(reach, torch.rand(1, generator=chance) * reach[-1]).clamp_max(
            len(vectors) - 1
        )
        picked.append(vectors[at])
        far = torch.minimum(far, (vectors - vectors[at]).pow(2).sum(1))
    return torch.cat(picked)


def _nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    lengths = centres.pow(2).sum(1)
    parts = vectors.split(max(1, CHUNK // len(centres)))
    return torch.cat([(lengths - 2 * part @ centres.T).argmin(1) for part in parts])


def _directions(weight: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor] | None:
    """The same three of a weight that is one codebook's directions times lengths; None where there are more of them."""
    vectors = weight.reshape(-1, format.v)
    long = vectors.norm(dim=1)
    unit = vectors / long.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    which = _alike(unit)
    if which is None:
        return None
    books = torch.zeros(format.m, ENTRIES, format.v)
    count = torch.bincount(which, minlength=ENTRIES).clamp_min(1)[:, None]
    books[0].index_add_(0, which, unit).div_(count)
    scales, lengths = _rank_one(long.view(weight.shape[0], -1), which.view(weight.shape[0], -1), format)
    books[0] *= lengths[:, None]
    # Further codebooks add nothing: their entries are all zero.
    codes = torch.zeros(weight.shape[0], long.numel() // weight.shape[0], format.m, dtype=torch.long)
    codes[..., 0] = which.view(weight.shape[0], -1)
    return codes, books, scales


def _alike(unit: Tensor) -> Tensor | None:
    """Which direction [N] each of these is, numbered from 0; None where there are more than entries."""
    rounded, which = (unit / ALIKE).round().unique(dim=0, return_inverse=True)
    if len(rounded) > 8 * ENTRIES:
        return None
    # Rounding may part what is one: neighbours go by the first of them.
    first = (torch.cdist(rounded, rounded, p=torch.inf) <= 2).int().argmax(1)
    numbers, merged = first.unique(return_inverse=True)
    return None if len(numbers) > ENTRIES else merged[which]


def _rank_one(long: Tensor, which: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """(scales [M, G], length of each entry [256]) with scale times length equal to ``long`` [M, S] where that can be,
    else near it by least squares: begun by going from group to group over the entries that they share, then in turns.
    """
    rows, groups = long.shape[0], format.groups(long.shape[1] * format.v)
    long, which = long.double().view(rows * groups, -1), which.view(rows * groups, -1)
    lengths = _passed_on(long, which)
    scales = torch.zeros(rows * groups, dtype=torch.float64)
    for _ in range(TURNS):
        worn = lengths[which]
        before, scales = scales, (long * worn).sum(1) / worn.pow(2).sum(1).clamp_min(1e-30)
        weight = scales[:, None].expand_as(long)
        lengths = _by_entry(which, weight * long, lengths) / _by_entry(
            which, weight.pow(2), torch.ones_like(lengths)
        )
        if torch.allclose(before, scales, rtol=1e-9, atol=0):
            break
    size = lengths.pow(2).mean().sqrt().clamp_min(1e-30)  # entries about 1, so that 16 bits hold both
    return (scales * size).float().view(rows, groups), (lengths / size).float()


TURNS = 50


def _by_entry(which: Tensor, values: Tensor, otherwise: Tensor) -> Tensor:
    """Sums of ``values`` by entry [256]; ``otherwise`` where they come to nothing."""
    sums = torch.zeros(ENTRIES, dtype=torch.float64).index_add_(0, which.reshape(-1), values.reshape(-1))
    return torch.where(sums > 0, sums, otherwise)


def _passed_on(long: Tensor, which: Tensor) -> Tensor:
    """Lengths of the entries [256], from groups whose scale is known to entries, and from those to further groups.

    ``long`` [N, vectors of a group] and ``which`` entry each is. What nothing ties to what is known begins with scale 1.
    """
    lengths, scales = torch.zeros(ENTRIES, dtype=torch.float64), torch.zeros(len(long), dtype=torch.float64)
    waiting = long.sum(1) > 0
    while waiting.any():
        seen = (lengths[which] > 0) & waiting[:, None] & (long > 0)
        tied = seen.any(1)
        if tied.any():
            ratio = torch.where(seen, long / lengths[which].clamp_min(1e-30), 0.0)
            scales = torch.where(tied, ratio.sum(1) / seen.sum(1).clamp_min(1), scales)
        else:
            tied = torch.zeros_like(waiting)
            tied[waiting.nonzero()[0]] = True
            scales[tied] = 1.0
        waiting = waiting & ~tied
        known = (scales > 0)[:, None].expand_as(long).double()
        top = _by_entry(which, known * long / scales.clamp_min(1e-30)[:, None], torch.zeros_like(lengths))
        count = _by_entry(which, known * (long > 0), torch.ones_like(lengths))
        lengths = torch.where(lengths > 0, lengths, top / count)
    return torch.where(lengths > 0, lengths, 1.0)
