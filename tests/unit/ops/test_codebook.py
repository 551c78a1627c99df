"""Weights in codebooks: what they stand for, gradients through them, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heliostat.errors import Refused
from heliostat.ops.codebook import Coded, dequantized, plain_codebook_linear
from heliostat.ops.codebook_format import Format

NAMES = ["m1v4g128", "m1v4g32", "m1v4grow", "m2v8g32", "m2v4g64", "m3v5g10", "m1v1g1", "m2v8grow"]


def coded_of(name: str, outputs: int, inputs: int, *, seed: int = 0) -> Coded:
    """Random codes, codebooks and scales of a weight of about unit length of a row."""
    format, chance = Format.parse(name), torch.Generator().manual_seed(seed)
    shapes = format.shapes(outputs, inputs)
    codes = torch.randint(256, shapes["codes"], generator=chance, dtype=torch.uint8)
    books = torch.randn(shapes["codebooks"], generator=chance) / (format.m * inputs) ** 0.5
    scales = torch.rand(shapes["scales"], generator=chance) + 0.5
    return Coded(format, inputs, codes, books.half(), scales.half())


def by_hand(coded: Coded) -> Tensor:
    """The weight, one number after another."""
    format, weight = coded.format, torch.zeros(coded.outputs, coded.inputs)
    for row in range(coded.outputs):
        for column in range(coded.inputs):
            segment, place = divmod(column, format.v)
            entries = [coded.codebooks[c, int(coded.codes[row, segment, c]), place] for c in range(format.m)]
            group = 0 if format.g is None else column // format.g
            weight[row, column] = sum(map(float, entries)) * float(coded.scales[row, group])
    return weight


@given(st.sampled_from(NAMES), st.integers(1, 6), st.integers(1, 40), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_a_weight_is_what_its_codes_say(name: str, outputs: int, inputs: int, seed: int) -> None:
    coded = coded_of(name, outputs, inputs, seed=seed)
    torch.testing.assert_close(coded.dense(torch.float32), by_hand(coded), rtol=1e-6, atol=1e-6)


def test_gradients_go_through_the_constant_weight() -> None:
    coded = coded_of("m2v8g32", 6, 44)
    weight = coded.dense(torch.float32)
    x = torch.randn(2, 3, 44, requires_grad=True)
    plain_codebook_linear(x, coded, torch.ones(6)).square().sum().backward()
    want = 2 * (x.detach() @ weight.T + 1) @ weight
    assert x.grad is not None
    torch.testing.assert_close(x.grad, want)


def test_gradients_reach_codebooks_and_scales_of_who_fits_them() -> None:
    coded = coded_of("m1v4g32", 5, 64)
    books, scales = coded.codebooks.float().requires_grad_(), coded.scales.float().requires_grad_()
    dequantized(coded.codes, books, scales, inputs=64, g=32).square().sum().backward()
    assert books.grad is not None and scales.grad is not None and bool(books.grad.any() and scales.grad.all())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("codes", lambda t: t[:, 1:]),
        ("codes", lambda t: t.int()),
        ("codebooks", lambda t: t[:, :255]),
        ("codebooks", lambda t: t.int()),
        ("scales", lambda t: t[:, :1]),
        ("scales", lambda t: t[1:]),
        ("scales", lambda t: t.int()),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(name: str, change: object) -> None:
    good = coded_of("m1v4g32", 5, 64)
    parts = {part: getattr(good, part) for part in ("codes", "codebooks", "scales")}
    parts[name] = change(parts[name])  # type: ignore[operator]
    with pytest.raises(Refused, match=name):
        Coded(good.format, 64, **parts)
