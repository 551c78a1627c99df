"""The compiled kernels against their twins in torch: shapes, tails, threads, number formats; and doing without them."""

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.errors import Refused
from heliostat.ops import native
from heliostat.ops.best import best, plain_best
from heliostat.ops.gate import gated, plain_gated
from heliostat.ops.linear import linear
from heliostat.ops.native import compiling
from heliostat.ops.norm import plain_rms_norm, rms_norm
from heliostat.ops.rope import cos_sin, plain_rotate, rotate

needs_kernels = pytest.mark.skipif(not native.built(), reason="the compiled kernels do not run here")
KINDS = st.sampled_from([(torch.float32, 2e-5), (torch.bfloat16, 0.02)])


def some(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


@needs_kernels
@given(
    st.integers(1, 18), st.integers(1, 40), st.integers(1, 150), KINDS, st.booleans(), st.integers(0, 2**16)
)
@settings(max_examples=150, deadline=None)
@torch.inference_mode()
def test_products_are_torchs(
    rows: int, outputs: int, inputs: int, kind: tuple[torch.dtype, float], more: bool, seed: int
) -> None:
    dtype, tolerance = kind
    x = some((rows, inputs + 3), seed, dtype)[:, :inputs]  # a view with longer rows
    weight = some((outputs, inputs), seed + 1, dtype) / inputs**0.5
    bias, residual = (
        some(s, seed + i, dtype) if more else None for i, s in ((2, (outputs,)), (3, (rows, outputs)))
    )
    want = x.float() @ weight.float().T
    if bias is not None and residual is not None:
        want += bias.float() + residual.float()
    close(native.linear(x, weight, bias, residual), want.to(dtype), tolerance)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("width", [96, 3072, 4096])
@torch.inference_mode()
def test_products_do_not_depend_on_threads(rows: int, width: int) -> None:
    x, weight, threads = some((rows, width), 0), some((70, width), 1), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(native.linear(x, weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    close(found[0] / width**0.5, x @ weight.T / width**0.5, 1e-5)


@given(st.integers(1, 5), st.integers(1, 70), KINDS, st.floats(0.01, 100), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
@torch.inference_mode()
def test_norm_and_gate_are_their_twins(
    rows: int, width: int, kind: tuple[torch.dtype, float], scale: float, seed: int
) -> None:
    dtype, tolerance = kind
    x, weight = (some((rows, 2 * width), seed) * scale).to(dtype), some((2 * width,), seed + 1, dtype)
    close(rms_norm(x, weight, 1e-6), plain_rms_norm(x, weight, 1e-6), tolerance)
    close(gated(x), plain_gated(x), tolerance)


@torch.inference_mode()
def test_the_gate_stays_finite_for_extreme_numbers() -> None:
    x = torch.tensor([[-1e30, -100.0, 0.0, 100.0, 1e30] + [1.0] * 5])
    close(gated(x), plain_gated(x), 1e-5)
    assert gated(torch.full((1, 8), torch.nan)).isnan().all()


@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([2, 8, 64, 80]), KINDS, st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
@torch.inference_mode()
def test_rotation_is_its_twin(
    rows: int, heads: int, width: int, kind: tuple[torch.dtype, float], seed: int
) -> None:
    dtype, tolerance = kind
    x = some((rows, heads + 1, width), seed, dtype)[:, :heads]
    angles = cos_sin(torch.arange(rows) * 37, 1e4 ** (-torch.arange(0, width, 2) / width), 1.0, dtype)
    want = plain_rotate(x, *angles)
    close(rotate(x.clone(memory_format=torch.preserve_format), *angles), want, tolerance)


def test_with_gradients_wanted_the_twins_run() -> None:
    x, weight = some((2, 8), 0).requires_grad_(), some((4, 8), 1).requires_grad_()
    (linear(x, weight).sum() + rms_norm(x, x[0], 1e-6).sum() + gated(x).sum()).backward()
    assert x.grad is not None and weight.grad is not None


@needs_kernels
@pytest.mark.parametrize("shape", [(70, 33, 96), (257, 32, 64), (9, 5, 7), (33, 100, 34)])
@pytest.mark.parametrize("kind", [(torch.float32, 2e-5), (torch.bfloat16, 0.02)])
@torch.inference_mode()
def test_products_of_many_rows_are_torchs_and_no_row_depends_on_the_others(
    shape: tuple[int, int, int], kind: tuple[torch.dtype, float]
) -> None:
    (rows, outputs, inputs), (dtype, tolerance) = shape, kind
    x, weight = some((rows, inputs), 0, dtype), some((outputs, inputs), 1, dtype) / inputs**0.5
    got = linear(x, weight)
    close(got, (x.float() @ weight.float().T).to(dtype), tolerance)
    assert all(torch.equal(linear(x[:some_rows], weight), got[:some_rows]) for some_rows in range(2, 11))


@given(
    st.integers(1, 4),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_the_best_is_its_twin_and_the_first_of_equals(
    rows: int, width: int, dtype: torch.dtype, seed: int
) -> None:
    logits = (some((rows, width), seed) * 2).round().to(dtype)  # few values: many equals
    for got, want in zip(best(logits), plain_best(logits), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 18])
def test_the_best_tells_of_numbers_that_are_none(what: float, place: int) -> None:
    logits = some((3, 19), 0)
    logits[1, place] = what
    assert best(logits)[1].tolist() == [True, False, True]


def test_switched_off_all_runs_on_torch() -> None:
    code = "from heliostat.ops import native; assert not native.built()"
    env = os.environ | {"HELIOSTAT_NATIVE": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=120)


def test_without_a_compiler_the_build_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    why = compiling.build(tmp_path / "kernels.so")
    assert why is not None and "no-such-compiler" in why
    assert list(tmp_path.iterdir()) == []


def test_kernels_of_other_sources_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ctypes.util.find_library("m")
    path = next(iter(Path("/").glob(f"lib/*/{library}")), None) if library else None
    if path is None or native.opened(str(path)) is None:
        pytest.skip("no other library, or no processor for kernels")
    monkeypatch.setenv("HELIOSTAT_NATIVE", str(path))
    with pytest.raises(Refused, match="was built from other sources"):
        native._library.__wrapped__()
