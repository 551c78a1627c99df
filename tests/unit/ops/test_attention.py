"""Fast attention against its plain twin: any shape, any grouping, any mask; over pages too."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.ops.attention import (
    PagedGroup,
    attention,
    paged_attention,
    plain_attention,
    plain_paged_attention,
)

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


@st.composite
def paged_passes(draw: st.DrawFn) -> tuple[list[PagedGroup], int]:
    """Groups of requests with pages in any order; every row of the pass in exactly one group."""
    groups, first = [], 0
    for _ in range(draw(st.integers(1, 3))):
        count, queries, most = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
        rows = torch.arange(first, first + count * queries).view(count, queries)
        pages = torch.tensor([[draw(st.integers(0, 5)) for _ in range(most)] for _ in range(count)])
        seen = torch.tensor([[draw(st.integers(1, 4 * most)) for _ in range(queries)] for _ in range(count)])
        groups.append(PagedGroup(rows, pages, seen))
        first += count * queries
    return groups, first


@given(paged_passes(), st.sampled_from([(2, 1), (4, 2), (3, 3)]), st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_paged_is_plain(made: tuple[list[PagedGroup], int], heads: tuple[int, int], seed: int) -> None:
    groups, rows = made
    q = some((rows, heads[0], 8), seed)
    keys, values = (some((6, 4, heads[1], 8), seed + i) for i in (1, 2))
    got, want = paged_attention(q, keys, values, groups), plain_paged_attention(q, keys, values, groups)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_what_lies_in_a_page_beyond_what_is_visible_does_not_matter() -> None:
    q, keys, values = some((1, 2, 8), 0), some((2, 4, 1, 8), 1), some((2, 4, 1, 8), 2)
    group = PagedGroup(torch.tensor([[0]]), torch.tensor([[1, 0]]), torch.tensor([[3]]))
    before = paged_attention(q, keys, values, [group])
    for what in (9.0, torch.nan, torch.inf):
        keys[0], values[0], keys[1, 3], values[1, 3] = what, what, what, what
        for attend in (paged_attention, plain_paged_attention):
            torch.testing.assert_close(attend(q, keys, values, [group]), before)
            torch.testing.assert_close(attend(q, keys, values, [replace(group, written=3)]), before)
        assert (
            float(keys[0, 0, 0, 0]) == what or torch.isnan(keys[0]).all()
        )  # the pages themselves are not changed
