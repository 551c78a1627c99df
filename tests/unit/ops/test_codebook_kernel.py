"""The kernels for weights in codebooks against the plain twin: formats, shapes, batches, tails, threads, number formats."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.ops.codebook import Coded
from heliostat.ops.codebook_format import Format
from heliostat.ops.codebook_product import CodedProduct, most_rows
from heliostat.ops.decoding import has_triton
from heliostat.ops.native import coded as kernel
from tests.unit.ops.test_codebook import NAMES, coded_of

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is first imported

needs_kernel = pytest.mark.skipif(not kernel.built(), reason="the compiled kernel does not run here")
needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not here")


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-9))


def given_x(rows: int, inputs: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def most_off(coded: Coded, x: torch.Tensor, planes: int) -> torch.Tensor:
    """[T, 1]: no output can be further off, whatever the codes are: a table rounds by so much, at every column."""
    v, m = coded.format.v, coded.format.m
    pieces = torch.nn.functional.pad(x, (0, -x.shape[1] % v)).unflatten(1, (-1, v)).norm(dim=-1)
    largest = pieces.amax(1) * coded.codebooks.float().norm(dim=-1).max()
    # Two planes: a table's number, those of x, those of a codebook, each by half of a unit.
    units = (0.5 + v / 500) / 126 if planes == 1 else (1 + v**0.5) / 32_000
    return (units * largest * coded.scales.float().max() * m * pieces.shape[1])[:, None]


@needs_kernel
@given(
    st.sampled_from(NAMES),
    st.integers(1, 300),
    st.integers(1, 400),
    st.integers(1, 9),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
@torch.inference_mode()
def test_the_kernel_is_its_twin(
    name: str, outputs: int, inputs: int, rows: int, planes: int, more: bool, seed: int
) -> None:
    coded = coded_of(name, outputs, inputs, seed=seed)
    weight, x = coded.dense(torch.float32), given_x(rows, inputs + 3, seed)[:, :inputs]
    bias = torch.ones(outputs) if more else None
    packed = kernel.Packed(coded)
    want, allowed = x @ weight.T + (1 if more else 0), most_off(coded, x, planes) + 1e-5
    assert bool(((packed.product(x, bias, planes=planes) - want).abs() <= allowed).all())
    half = x.bfloat16()
    want = half.float() @ weight.T + (1 if more else 0)
    found = packed.product(half, None if bias is None else bias.bfloat16(), planes=planes)
    assert found.dtype == torch.bfloat16
    assert bool(((found.float() - want).abs() <= allowed * 1.02 + want.abs() / 128).all())


@needs_kernel
@pytest.mark.parametrize("name", ["m1v4g128", "m1v4g32", "m2v8g128", "m2v4g128"])
@torch.inference_mode()
def test_one_plane_is_good_to_a_hundredth_and_two_to_a_thousandth(name: str) -> None:
    coded, x = coded_of(name, 256, 1024), given_x(4, 1024, 0)
    packed, want = kernel.Packed(coded), x @ coded.dense(torch.float32).T
    assert error(packed.product(x, planes=1), want) < 0.01
    assert error(packed.product(x, planes=2), want) < 3e-4


@needs_kernel
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("name", ["m1v4g128", "m2v8g128", "m2v4g64"])
@torch.inference_mode()
def test_no_bit_depends_on_threads_or_on_other_rows(name: str, planes: int) -> None:
    packed, x, threads = (
        kernel.Packed(coded_of(name, 500, 1028)),
        given_x(32, 1028, 0),
        torch.get_num_threads(),
    )
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(packed.product(x, planes=planes))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for rows in (1, 2, 7):
        assert torch.equal(packed.product(x[:rows], planes=planes), found[0][:rows])


@needs_kernel
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 40, 64])
@torch.inference_mode()
def test_numbers_that_are_none_spoil_their_row_and_no_other(what: float, place: int) -> None:
    packed, x = kernel.Packed(coded_of("m1v4g32", 70, 65)), given_x(3, 65, 0)
    x[1, place] = what
    assert packed.product(x).isfinite().all(1).tolist() == [True, False, True]
    assert not packed.product(torch.zeros(2, 65)).any()


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_whatever_is_chosen_the_product_is_the_twins(rows: int, dtype: torch.dtype) -> None:
    coded = coded_of("m1v4g32", 90, 130)
    x, product = given_x(rows, 130, 1).to(dtype).view(rows, 1, 130), CodedProduct(coded)
    got = product(x)
    assert got.shape == (rows, 1, 90) and got.dtype == dtype
    assert error(got, x.float() @ coded.dense(torch.float32).T) < (1e-3 if dtype == torch.float32 else 1e-2)
    looked_up = dtype == torch.bfloat16 and kernel.built() and rows <= most_rows(coded.format, 90, 130)
    dense = 90 * 130 * x.element_size()
    assert (
        product.bytes["dense"] == (0 if looked_up else dense) and bool(product.bytes["packed"]) == looked_up
    )


@pytest.mark.parametrize(
    ("name", "outputs", "inputs", "rows"),
    [
        ("m1v4g128", 4096, 4096, 9),
        ("m1v4g128", 768, 768, 7),
        ("m2v4g128", 4096, 4096, 4),
        ("m2v8g128", 768, 768, 5),
        ("m3v5g10", 8, 8, 1),
    ],
)
def test_small_weights_and_more_bits_are_dense_earlier(
    name: str, outputs: int, inputs: int, rows: int
) -> None:
    assert most_rows(Format.parse(name), outputs, inputs) == rows


@torch.inference_mode()
def test_what_the_kernel_has_no_layout_for_runs_dense() -> None:
    coded = coded_of("m2v8g32", 9, 64)
    odd = Coded(coded.format, 64, coded.codes, coded.codebooks.float(), coded.scales)
    product, x = CodedProduct(odd), given_x(1, 64, 0)
    assert error(product(x), x @ odd.dense(torch.float32).T) < 1e-5 and product.bytes["packed"] == 0


@needs_triton
@pytest.mark.parametrize(
    ("name", "outputs", "inputs"), [("m1v4g32", 40, 70), ("m2v8grow", 33, 128), ("m3v5g10", 7, 33)]
)
@pytest.mark.parametrize("rows", [1, 17])
@torch.inference_mode()
def test_the_kernel_for_gpus_is_its_twin(name: str, outputs: int, inputs: int, rows: int) -> None:
    from heliostat.ops.triton_codebook import product

    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = coded_of(name, outputs, inputs)
    parts = (part.to(device) for part in (plain.codes, plain.codebooks, plain.scales))
    coded, x = Coded(plain.format, inputs, *parts), given_x(rows, inputs, 0).to(device)
    bias = torch.arange(outputs, device=device).float()
    torch.testing.assert_close(product(x, coded, bias), x @ coded.dense(torch.float32).T + bias)
