"""Scaled and gated attention, and prefix sums, against a direct dense computation in float64: packed, padded, gradients."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heliostat.model.seam import Causal, Masked, Reading
from heliostat.ops import mixing_taped, native
from heliostat.ops.mixing import Mix, Prefix

HEADS, GROUPS, WIDTH = 4, 2, 4


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, mix: Mix) -> Tensor:
    """[alpha softmax(QK / sqrt d) + (average - alpha) / N] V over what ``mask`` [B, T, S] shows, gated; any dtype."""
    k, v = (each.repeat_interleave(HEADS // GROUPS, 2) for each in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / WIDTH**0.5
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    if mix.sinks is not None:
        scores = torch.cat([scores, mix.sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[1]]
    if mix.alpha is not None:
        alpha = mix.alpha.expand(*q.shape[:3]).movedim(-1, 1)[..., None]  # [B, H, T, 1]
        assert mix.average is not None
        counts = mask.sum(-1)[:, None, :, None] if mix.length is None else mix.length
        weights = alpha * weights + (mix.average[:, None, None] - alpha) / counts * mask[:, None]
    out = torch.einsum("bhts,bshd->bthd", weights, v)
    return out if mix.gate is None else out * mix.gate.sigmoid()[..., None]


def mix_of(kind: str, batch: int, length: int) -> Mix:
    alpha = 0.2 + 0.6 * torch.rand(batch, length, HEADS, generator=torch.Generator().manual_seed(3))
    average, gate = torch.linspace(0.2, 0.9, HEADS), some(batch, length, HEADS, seed=4)
    return {
        "affine": Mix(alpha, average),
        "fixed": Mix(alpha, average, length=64),
        "constant": Mix(torch.full((HEADS,), 0.5), average),
        "affine+gated": Mix(alpha, average, gate=gate),
        "gated": Mix(gate=gate),
        "sink": Mix(sinks=torch.linspace(-3, 5, HEADS)),
    }[kind]


def without_kernels() -> AbstractContextManager[Any]:
    """The twin of the compiled mixing runs."""
    return patch.object(mixing_taped, "serves", lambda *_: False)


KINDS = ["affine", "fixed", "constant", "affine+gated", "gated", "sink"]


def both(
    seam: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    mix: Mix,
    held: Sequence[str] = ("average",),
) -> None:
    """Outputs and all gradients of a body of the seam are those of the dense computation in float64; but of ``held``.

    Its twin's, too, which learns about all.
    """
    if held:
        with without_kernels():
            both(seam, q, k, v, mask, mix, held=())
    fields = ("alpha", "average", "gate", "sinks")
    leaves = {"q": q, "k": k, "v": v} | {f: own for f in fields if (own := getattr(mix, f)) is not None}
    found = []
    for dtype in (torch.float32, torch.float64):
        own = {n: t.to(dtype).clone().requires_grad_(n not in held) for n, t in leaves.items()}
        mixed = Mix(length=mix.length, **{f: own[f] for f in fields if f in own})
        args = (own["q"], own["k"], own["v"])
        out = seam(0, *args, mixed) if dtype is torch.float32 else dense(*args, mask, mixed)
        (out * some(*out.shape, seed=9).to(dtype)).sum().backward()
        slopes = {n: t.grad.double() for n, t in own.items() if n not in held}
        found.append((out.detach().double(), slopes))
    (got, slopes), (want, wanted) = found
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for name, slope in wanted.items():
        torch.testing.assert_close(slopes[name], slope, rtol=1e-4, atol=1e-4, msg=name)


def qkv(batch: int, length: int, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    keys = length if keys is None else keys
    q = some(batch, length, HEADS, WIDTH, seed=0)
    return q, some(batch, keys, GROUPS, WIDTH, seed=1), some(batch, keys, GROUPS, WIDTH, seed=2)


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 2), st.integers(1, 40))
@settings(max_examples=12, deadline=None)
def test_causal_is_dense(kind: str, batch: int, length: int) -> None:
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, -1, -1)
    both(Causal(), *qkv(batch, length), mask, mix_of(kind, batch, length))


@st.composite
def packed(draw: st.DrawFn) -> Tensor:
    """Numbers of documents side by side, [2, T]."""
    length = draw(st.integers(1, 50))
    begins = [
        [False] + [draw(st.booleans()) and draw(st.booleans()) for _ in range(length - 1)] for _ in range(2)
    ]
    return torch.tensor(begins).cumsum(1)


@pytest.mark.parametrize("kind", KINDS)
@given(packed())
@settings(max_examples=15, deadline=None)
def test_packed_documents_are_dense(kind: str, numbers: Tensor) -> None:
    length = numbers.shape[1]
    mask = (numbers[:, :, None] == numbers[:, None]) & torch.ones(length, length, dtype=torch.bool).tril()
    both(Masked.documents(numbers), *qkv(2, length), mask, mix_of(kind, 2, length))


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(1, 8), st.integers(1, 20), st.integers(0, 2**16))
@settings(max_examples=12, deadline=None)
def test_any_mask_over_what_others_wrote_is_dense(kind: str, length: int, keys: int, seed: int) -> None:
    mask = some(2, length, keys, seed=seed) > 0
    mask[..., 0] |= ~mask.any(-1)
    q, k, v = qkv(2, length, keys)

    def seam(layer: int, q: Tensor, k: Tensor, v: Tensor, mix: Mix) -> Tensor:
        return Reading([{0: (k, v)}], mask[:, None], own=False)(layer, q, q, q, mix)

    both(seam, q, k, v, mask, mix_of(kind, 2, length))


@given(packed(), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_no_bit_of_another_document_or_of_the_future_leaks(numbers: Tensor, seed: int) -> None:
    """What a position must not see may be anything; counts are those of the mask."""
    length = numbers.shape[1]
    place = seed % length
    v = some(2, length, GROUPS, WIDTH, seed=seed)
    prefix = Prefix(length, numbers)
    before = prefix(v)[:, place].clone()
    seen = (numbers == numbers[:, place : place + 1]) & (torch.arange(length) <= place)
    assert torch.equal(prefix.seen[:, place], seen.sum(1).float())
    changed = torch.where(seen[..., None, None], v, v * 1e6 + 7)
    assert torch.equal(prefix(changed)[:, place], before)


@pytest.mark.parametrize("kind", KINDS)
def test_right_padding_and_its_gradients_are_seen_by_nobody(kind: str) -> None:
    q, k, v = qkv(1, 20)
    mix = mix_of(kind, 1, 20)
    short = Causal()(0, q[:, :13], k[:, :13], v[:, :13], _cut(mix, 13))
    v = torch.where(torch.arange(20)[:, None, None] < 13, v, 1e9).requires_grad_()
    whole = Causal()(0, q, k, v, mix)[:, :13]
    torch.testing.assert_close(whole, short, rtol=0, atol=1e-6)
    whole.sum().backward()
    assert v.grad is not None and not v.grad[:, 13:].any() and v.grad[:, :13].any()


def _cut(mix: Mix, count: int) -> Mix:
    alpha = mix.alpha if mix.alpha is None or mix.alpha.dim() == 1 else mix.alpha[:, :count]
    return Mix(alpha, mix.average, mix.length, None if mix.gate is None else mix.gate[:, :count], mix.sinks)


def test_every_row_weighs_as_much_as_the_average_says() -> None:
    """With as many in the sum as are seen, the weights of a query add up to the average of alpha."""
    q, k, _ = qkv(1, 30)
    ones = torch.ones(1, 30, GROUPS, WIDTH)
    mix = mix_of("affine", 1, 30)
    assert mix.average is not None
    out = Causal()(0, q, k, ones, mix)
    torch.testing.assert_close(out, mix.average[:, None].expand_as(out), rtol=0, atol=1e-5)


def test_prefix_sums_under_autocast_stay_float32() -> None:
    v = some(1, 40, GROUPS, WIDTH, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = Prefix(40)(v)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, v.double().cumsum(1).float(), rtol=0, atol=1e-5)


@pytest.mark.skipif(not native.built(), reason="no compiled kernels here")
@pytest.mark.parametrize("kind", ["affine", "fixed", "constant", "affine+gated"])
@pytest.mark.parametrize("formats", ["float32", "bfloat16", "float32 bfloat16"])
@given(packed(), st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]), st.sampled_from([2, 16, 24, 40]))
@settings(max_examples=8, deadline=None)
def test_compiled_mixing_is_its_twin(
    kind: str, formats: str, numbers: Tensor, heads: tuple[int, int], width: int
) -> None:
    """Forwards and backwards, whatever the heads and their width; the same bits for any number of threads.

    ``formats``: of what attention said, and of values where theirs is another, as under autocast.
    """
    count, groups = heads
    dtype, narrow = (getattr(torch, (formats.split() * 2)[place]) for place in (0, 1))
    shape = (*numbers.shape, count)
    alpha = torch.rand(*shape, generator=torch.Generator().manual_seed(1))
    if kind == "constant":
        alpha = torch.full((count,), 0.5)
    leaves = [
        some(*shape, width, seed=2).to(dtype),
        some(*numbers.shape, groups, width, seed=3).to(dtype),
        alpha,
    ]
    if kind == "affine+gated":
        leaves.append(some(*shape, seed=4).to(dtype))
    slope = some(*shape, width, seed=5).to(dtype)

    def run(finish: Callable[[Tensor, Tensor, Mix], Tensor]) -> list[Tensor]:
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        gate = own[3] if len(own) > 3 else None
        mix = Mix(own[2], torch.linspace(0.2, 0.9, count), 64 if kind == "fixed" else None, gate)
        out = finish(own[0], own[1], mix)
        out.backward(slope)
        return [out.detach(), *(leaf.grad for leaf in own if leaf.grad is not None)]

    prefix = Prefix(numbers.shape[1], numbers)
    plain = run(lambda said, v, mix: mix.finish(said, prefix(v), prefix.seen))
    found = run(lambda said, v, mix: mixing_taped.finish(said, v, mix, numbers))
    rough: dict[str, Any] = (
        {"rtol": 2e-2, "atol": 2e-2} if narrow is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    )
    for got, want in zip(found, plain, strict=True):
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want, **rough)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = run(lambda said, v, mix: mixing_taped.finish(said, v, mix, numbers))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.skipif(not native.built(), reason="no compiled kernels here")
@given(packed(), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_compiled_sums_leak_no_bit_of_another_document_or_of_the_future(numbers: Tensor, seed: int) -> None:
    length = numbers.shape[1]
    place = seed % length
    said, v = some(2, length, HEADS, WIDTH, seed=seed), some(2, length, GROUPS, WIDTH, seed=seed + 1)
    mix = mix_of("affine", 2, length)
    before = mixing_taped.finish(said, v, mix, numbers)[:, place]
    seen = (numbers == numbers[:, place : place + 1]) & (torch.arange(length) <= place)
    changed = torch.where(seen[..., None, None], v, v * 1e6 + 7)
    assert torch.equal(mixing_taped.finish(said, changed, mix, numbers)[:, place], before)
