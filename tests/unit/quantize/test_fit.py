"""A weight's fit: exact where it can be, better with every turn, the same for a seed; the beam against all choices."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.ops.codebook import dequantized
from heliostat.ops.codebook_format import ENTRIES, Format
from heliostat.quantize.fit import Effort, Fit, damped, error, fit, search, settled
from heliostat.quantize.starting import k_means

INPUTS = 64


def shaped(format: Format, rows: int, seed: int, *, books: int = 1) -> tuple[torch.Tensor, Fit]:
    """A weight [rows, 64] that codebooks make exactly, and the codebooks that do; only the first ``books`` are not zero."""
    chance = torch.Generator().manual_seed(seed)
    entries = torch.zeros(format.m, ENTRIES, format.v)
    entries[:books] = torch.randn(books, ENTRIES, format.v, generator=chance)
    codes = torch.randint(0, ENTRIES, (rows, format.segments(INPUTS), format.m), generator=chance)
    scales = 0.2 + torch.rand(rows, format.groups(INPUTS), generator=chance)
    weight = dequantized(codes, entries, scales, inputs=INPUTS, g=format.g)
    return weight, Fit(format, codes, entries, scales)


def square(seed: int, tokens: int = 200) -> torch.Tensor:
    """X^T X of inputs that hang together."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, INPUTS, generator=chance) @ torch.randn(INPUTS, INPUTS, generator=chance)
    return x.T @ x


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["m1v4g32", "m1v8g64", "m2v4g16", "m1v8grow", "m2v8g32"]),
    st.integers(1, 12),
    st.integers(0, 1000),
)
def test_a_weight_that_one_codebook_makes_is_found_exactly(name: str, rows: int, seed: int) -> None:
    weight, _ = shaped(Format.parse(name), rows, seed)
    found = fit(weight, square(seed), Format.parse(name), seed=0)
    assert error(weight, found.dense(), damped(square(seed))) < 1e-9
    kept = found.coded().dense(torch.float32)
    assert (kept - weight).norm() <= 2e-3 * weight.norm()  # what 16 bits of codebooks and scales lose


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["m1v4g32", "m2v4g32", "m3v8grow"]), st.integers(0, 1000), st.integers(1, 6))
def test_codes_are_found_again_by_who_has_the_codebooks(name: str, seed: int, beam: int) -> None:
    format = Format.parse(name)
    weight, true = shaped(format, 3, seed, books=1)
    lost = Fit(format, torch.zeros_like(true.codes), true.codebooks, true.scales)
    found = search(weight, lost, torch.eye(INPUTS), beam=beam)
    assert error(weight, found.dense(), torch.eye(INPUTS)) < 1e-10


def test_a_wide_beam_finds_the_best_of_all_choices() -> None:
    format = Format(1, 2, 4)
    chance = torch.Generator().manual_seed(3)
    weight, books = torch.randn(2, 4, generator=chance), torch.zeros(1, ENTRIES, 2)
    books[0, :6] = torch.randn(6, 2, generator=chance)
    books[0, 6:] = 1e3  # never worth it
    around = torch.randn(9, 4, generator=chance)
    start = Fit(format, torch.zeros(2, 2, 1, dtype=torch.long), books, torch.ones(2, 1))
    found = search(weight, start, around.T @ around, beam=40)
    for row in range(2):
        costs = []
        for choice in itertools.product(range(6), repeat=2):
            gap = weight[row] - torch.cat([books[0, c] for c in choice])
            costs.append(float(gap @ around.T @ around @ gap))
        gap = weight[row] - found.dense()[row]
        assert float(gap @ around.T @ around @ gap) == pytest.approx(min(costs), rel=1e-4)


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(["m1v4g32", "m2v4g64", "m1v8grow"]), st.integers(0, 100))
def test_every_turn_makes_a_weight_of_any_kind_better(name: str, seed: int) -> None:
    weight = torch.randn(48, INPUTS, generator=torch.Generator().manual_seed(seed))
    format, around = Format.parse(name), square(seed)
    heard: list[float] = []
    quick = Effort(rounds=1, steps=15)
    found = fit(weight, around, format, seed=seed, effort=quick, tell=heard.append)
    assert len(heard) == 2 and error(weight, found.dense(), damped(around)) == min(heard)
    again = search(weight, found, damped(around), beam=2)
    assert error(weight, again.dense(), damped(around)) <= min(heard) * (1 + 1e-4)
    better = settled(weight, again, damped(around), quick)
    assert error(weight, better.dense(), damped(around)) <= error(weight, again.dense(), damped(around)) * (
        1 + 1e-4
    )
    twice = fit(weight, around, format, seed=seed, effort=quick)
    assert torch.equal(twice.codes, found.codes) and torch.equal(twice.codebooks, found.codebooks)


@pytest.mark.parametrize("name", ["m1v4g32", "m2v4grow"])
def test_a_weight_of_nothing_and_inputs_of_nothing(name: str) -> None:
    nothing = torch.zeros(4, INPUTS)
    assert fit(nothing, torch.zeros(INPUTS, INPUTS), Format.parse(name), seed=0).dense().count_nonzero() == 0
    some = torch.randn(4, INPUTS)
    found = fit(some, torch.zeros(INPUTS, INPUTS), Format.parse(name), seed=0)
    assert error(some, found.dense(), torch.eye(INPUTS)) < 0.05


def test_fewer_vectors_than_entries_are_all_kept() -> None:
    vectors = torch.randn(40, 3)
    centres, which = k_means(vectors, torch.Generator().manual_seed(0))
    assert torch.allclose(centres[which], vectors)
