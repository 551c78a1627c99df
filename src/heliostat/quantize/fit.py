"""One weight in codebooks by AQLM's procedure (arXiv 2401.06118): beam search for codes, Adam for the rest, in turns.

What is made small is ||W X - W^ X||^2 over calibration inputs X, of which only X^T X [K, K] is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.ops.codebook import Coded, dequantized
from heliostat.ops.codebook_format import ENTRIES, Format
from heliostat.quantize.starting import start

DAMPING = 0.01
"""Of the mean squared input, added to every input's: directions that calibration has not seen still count a little."""
BEAM_NUMBERS = 2**24
"""Candidates that the beam search holds at once."""
EXACT = 1e-12
"""Relative error from which on nothing is left to find."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long one weight is fitted."""

    rounds: int = 3
    """Turns of beam search and Adam."""
    beam: int = 4
    """Rows' choices of codes that are kept while their vectors are gone through."""
    steps: int = 60
    """Of Adam in a round."""
    learning_rate: float = 2e-2
    """Of Adam, for codebooks of entries about 1 and for scales by their own size."""


@dataclass(slots=True)
class Fit:
    """A weight on its way: codes [M, S, m] int64, codebooks [m, 256, v] and scales [M, groups] float32."""

    format: Format
    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    @property
    def inputs(self) -> int:
        """K."""
        return self.codes.shape[1] * self.format.v

    def dense(self) -> Tensor:
        """[M, K] float32."""
        return dequantized(self.codes, self.codebooks, self.scales, inputs=self.inputs, g=self.format.g)

    def coded(self) -> Coded:
        """As it is kept: codes in 8 bits, numbers in 16."""
        numbers = self.codebooks.half(), self.scales.half()
        return Coded(self.format, self.inputs, self.codes.to(torch.uint8), *numbers)


def fit(
    weight: Tensor,
    square: Tensor,
    format: Format,
    *,
    seed: int,
    effort: Effort = Effort(),
    tell: Callable[[float], None] = lambda error: None,
) -> Fit:
    """Codes, codebooks and scales for a weight [M, K] (float32) over inputs with X^T X ``square`` [K, K].

    ``tell`` hears the relative error after the start and after each round. The same seed gives the same fit.
    """
    chance = torch.Generator().manual_seed(seed)
    square = damped(square)
    found = Fit(format, *start(weight, format, chance))
    best, lowest = found, error(weight, found.dense(), square)
    tell(lowest)
    for _ in range(effort.rounds):
        if lowest <= EXACT:
            break
        found = search(weight, found, square, beam=effort.beam)
        found = settled(weight, found, square, effort)
        now = error(weight, found.dense(), square)
        if now < lowest:
            best, lowest = found, now
        tell(lowest)
    return best


def damped(square: Tensor) -> Tensor:
    """X^T X [K, K] as float32 of mean 1 on its diagonal, a little added there; the identity where nothing came in."""
    mean = float(square.diagonal().mean())
    if mean <= 0:
        return torch.eye(square.shape[0])
    square = (square / mean).float()
    return square + DAMPING * torch.eye(square.shape[0])


def error(weight: Tensor, other: Tensor, square: Tensor) -> float:
    """||W X - W^ X||^2 / ||W X||^2; 0 where both are nothing."""
    gap, whole = _size(weight - other, square), _size(weight, square)
    return float(gap / whole) if whole > 0 else float(gap)


def _size(weight: Tensor, square: Tensor) -> Tensor:
    return ((weight @ square) * weight).sum(dtype=torch.float64).clamp_min(0)


def search(weight: Tensor, found: Fit, square: Tensor, *, beam: int) -> Fit:
    """Better codes for the same codebooks and scales: of each row the ``beam`` best choices, vector after vector."""
    # At a vector every row holds beam x 256 candidates, and beam x K numbers of what is left of it.
    rows = max(1, BEAM_NUMBERS // (beam * max(ENTRIES, weight.shape[1])))
    parts = [
        _searched(
            weight[i : i + rows], found.codes[i : i + rows], found.scales[i : i + rows], found, square, beam
        )
        for i in range(0, weight.shape[0], rows)
    ]
    return Fit(found.format, torch.cat(parts), found.codebooks, found.scales)


def _searched(weight: Tensor, codes: Tensor, scales: Tensor, found: Fit, square: Tensor, beam: int) -> Tensor:
    """The best of a beam for some rows R: codes [R, S, m]. L: choices of a row that are held, at most ``beam``."""
    form, books = found.format, found.codebooks
    left = weight - dequantized(codes, books, scales, inputs=found.inputs, g=form.g)
    gaps, held = left[:, None], codes[:, None]  # [R, L, K], [R, L, S, m]
    cost = ((left @ square) * left).sum(1)[:, None]  # [R, L]
    per = form.segments(found.inputs) if form.g is None else form.g // form.v
    for segment in range(codes.shape[1]):
        span = slice(segment * form.v, (segment + 1) * form.v)
        scale = scales[:, segment // per]  # [R]
        local = square[span, span]
        for book in range(form.m):
            entries = books[book]  # [256, v]
            # The entry that stands there is taken out: what it would be to have none is where all begin.
            taken = scale[:, None, None] * entries[held[:, :, segment, book]]  # [R, L, v]
            pull = gaps @ square[:, span]  # [R, L, v]
            bare = cost + ((2 * pull + taken @ local) * taken).sum(-1)
            pull = pull + taken @ local
            own = ((entries @ local) * entries).sum(1)  # [256]
            costs = bare[..., None] - 2 * scale[:, None, None] * (pull @ entries.T)
            costs = costs + (scale * scale)[:, None, None] * own
            gaps, held, cost = _kept(costs, gaps, held, taken, scale, entries, span, (segment, book), beam)
    return held[torch.arange(len(held)), cost.argmin(1)]


def _kept(
    costs: Tensor,
    gaps: Tensor,
    held: Tensor,
    taken: Tensor,
    scale: Tensor,
    entries: Tensor,
    span: slice,
    place: tuple[int, int],
    beam: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``beam`` cheapest of all candidates [R, L, 256]: what is left of each, its codes, its cost."""
    cost, at = costs.flatten(1).topk(min(beam, costs[0].numel()), largest=False)
    parent, code = at // ENTRIES, at % ENTRIES  # [R, L']
    rows = torch.arange(len(at))[:, None]
    gaps, held, taken = gaps[rows, parent], held[rows, parent], taken[rows, parent]
    gaps[..., span] += taken - scale[:, None, None] * entries[code]
    held[:, :, place[0], place[1]] = code
    return gaps, held, cost


def settled(weight: Tensor, found: Fit, square: Tensor, effort: Effort) -> Fit:
    """Better codebooks and scales for the same codes, by Adam; the best state that was seen."""
    books = found.codebooks.clone().requires_grad_()
    # Scales by their own size, so that one rate serves large and small ones.
    factors = torch.ones_like(found.scales).requires_grad_()
    adam = torch.optim.Adam([books, factors], lr=effort.learning_rate, betas=(0.9, 0.95))
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / effort.steps)
    whole = _size(weight, square).clamp_min(torch.finfo(torch.float32).tiny)
    best, lowest = found, float("inf")
    for step in range(effort.steps + 1):
        now = Fit(found.format, found.codes, books, found.scales * factors)
        with torch.enable_grad():
            gap = weight - now.dense()
            loss = ((gap @ square) * gap).sum() / whole
        if loss.item() < lowest:
            lowest = loss.item()
            best = Fit(found.format, found.codes, books.detach().clone(), now.scales.detach().clone())
        if step == effort.steps:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
    return best
