"""Fast attention against its plain twin: any shape, any grouping, any mask."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.ops.attention import _with_sinks, _with_summed_sinks, attention, plain_attention

SIZES = st.tuples(
    st.integers(1, 3),  # B
    st.integers(1, 9),  # T
    st.integers(1, 9),  # S
    st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2), (3, 3)]),  # H, K
    st.sampled_from([2, 8]),  # D
)


def some(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(SIZES, st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_fast_is_plain_under_any_mask(sizes: tuple, seed: int) -> None:
    batch, queries, keys, (heads, groups), width = sizes
    q, k = some((batch, queries, heads, width), seed), some((batch, keys, groups, width), seed + 1)
    v = some((batch, keys, groups, width), seed + 2)
    mask = some((batch, 1, queries, keys), seed + 3) > 0
    mask[..., 0] |= ~mask.any(-1)  # every query sees something
    for tape in (False, True):
        with torch.set_grad_enabled(tape):
            torch.testing.assert_close(
                attention(q, k, v, mask), plain_attention(q, k, v, mask), rtol=0, atol=1e-5
            )
            torch.testing.assert_close(attention(q, k, v), plain_attention(q, k, v), rtol=0, atol=1e-5)


@given(SIZES, st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_fast_is_plain_where_causal(sizes: tuple, seed: int) -> None:
    batch, length, _, (heads, groups), width = sizes
    q = some((batch, length, heads, width), seed)
    k, v = (some((batch, length, groups, width), seed + i) for i in (1, 2))
    got, want = attention(q, k, v, causal=True), plain_attention(q, k, v, causal=True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_plain_twin() -> None:
    shapes = [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)]
    fast = [some(shape, i).requires_grad_() for i, shape in enumerate(shapes)]
    plain = [t.detach().clone().requires_grad_() for t in fast]
    mask = torch.ones(5, 7, dtype=torch.bool).tril(2)
    attention(fast[0], fast[1], fast[2], mask).square().sum().backward()
    plain_attention(plain[0], plain[1], plain[2], mask).square().sum().backward()
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tape", [False, True])
def test_bfloat16_queries_read_float32_keys(tape: bool) -> None:
    q, k, v = some((1, 3, 4, 8), 0, torch.bfloat16), some((1, 5, 2, 8), 1), some((1, 5, 2, 8), 2)
    with torch.set_grad_enabled(tape):
        out = attention(q, k, v)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), plain_attention(q.float(), k, v), rtol=0, atol=0.05)


@pytest.mark.parametrize("way", [_with_sinks, _with_summed_sinks])
@pytest.mark.parametrize("causal", [True, False])
@given(SIZES, st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_both_ways_of_a_sink_are_plain_with_their_gradients(
    way: Callable[..., torch.Tensor], causal: bool, sizes: tuple, seed: int
) -> None:
    batch, queries, keys, (heads, groups), width = sizes
    keys = queries if causal else keys
    shapes = [
        (batch, queries, heads, width),
        (batch, keys, groups, width),
        (batch, keys, groups, width),
        (heads,),
    ]
    mask = None
    if not causal:
        mask = some((batch, 1, queries, keys), seed + 4) > 0
        mask[..., 0] |= ~mask.any(-1)
    found = []
    for fast in (True, False):
        q, k, v, sinks = (some(shape, seed + n).requires_grad_() for n, shape in enumerate(shapes))
        if fast:
            out = way(q, k, v, mask, causal, sinks)
        else:
            out = plain_attention(q, k, v, mask, causal=causal, sinks=sinks)
        out.square().sum().backward()
        found.append([out.detach(), q.grad, k.grad, v.grad, sinks.grad])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
