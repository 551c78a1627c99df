"""Attention over pages, and writing to them: the fast ways against the plain twins."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.ops import native
from heliostat.ops.paging import (
    PagedGroup,
    grouped_attention,
    plain_paged_attention,
    plain_write_pages,
    write_pages,
)


def some(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
def test_grouped_is_plain(made: tuple[list[PagedGroup], int], heads: tuple[int, int], seed: int) -> None:
    groups, rows = made
    q = some((rows, heads[0], 8), seed)
    keys, values = (some((6, 4, heads[1], 8), seed + i) for i in (1, 2))
    for sinks in (None, 4 * some((heads[0],), seed + 3)):
        got = grouped_attention(q, keys, values, groups, sinks)
        want = plain_paged_attention(q, keys, values, groups, sinks)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_what_lies_in_a_page_beyond_what_is_visible_does_not_matter() -> None:
    q, keys, values = some((1, 2, 8), 0), some((2, 4, 1, 8), 1), some((2, 4, 1, 8), 2)
    group = PagedGroup(torch.tensor([[0]]), torch.tensor([[1, 0]]), torch.tensor([[3]]))
    before = grouped_attention(q, keys, values, [group])
    for what in (9.0, torch.nan, torch.inf):
        keys[0], values[0], keys[1, 3], values[1, 3] = what, what, what, what
        for attend in (grouped_attention, plain_paged_attention):
            torch.testing.assert_close(attend(q, keys, values, [group]), before)
            torch.testing.assert_close(attend(q, keys, values, [replace(group, written=3)]), before)
        assert (
            float(keys[0, 0, 0, 0]) == what or torch.isnan(keys[0]).all()
        )  # the pages themselves are not changed


def ragged(groups: list[PagedGroup]) -> native.Ragged:
    """The same requests laid end to end."""
    entries = [
        e for g in groups for e in zip(g.rows.tolist(), g.visible.tolist(), g.pages.tolist(), strict=True)
    ]
    rows, visible, pages = (list(chain.from_iterable(entry[i] for entry in entries)) for i in range(3))
    starts, page_starts = [0], [0]
    for own, _, paged in entries:
        starts.append(starts[-1] + len(own))
        page_starts.append(page_starts[-1] + len(paged))
    return native.Ragged(*map(torch.tensor, (rows, visible, starts, pages, page_starts[:-1])))


@pytest.mark.skipif(not native.built(), reason="the compiled kernels do not run here")
@given(
    paged_passes(),
    st.sampled_from([(2, 1), (4, 2), (3, 3)]),
    st.sampled_from([8, 32, 80]),
    st.sampled_from([4, 16, 24]),
    st.sampled_from([(torch.float32, 1e-5), (torch.bfloat16, 0.03)]),
    st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_the_kernel_is_plain(
    made: tuple[list[PagedGroup], int],
    heads: tuple[int, int],
    width: int,
    slots: int,
    kind: tuple[torch.dtype, float],
    seed: int,
) -> None:
    (groups, rows), (dtype, tolerance) = made, kind
    beside = some(
        (rows, heads[0] + 2, width), seed, dtype
    )  # queries lie in a wider row, as after a joined product
    q = beside[:, : heads[0]]
    keys, values = (some((6, slots, heads[1], width), seed + i, dtype) for i in (1, 2))
    for group in groups:
        group.visible.mul_(slots).floor_divide_(4)
    for sinks in (None, 8 * some((heads[0],), seed + 3, dtype), torch.full((heads[0],), 300.0, dtype=dtype)):
        with torch.inference_mode():
            got = native.attend(q, keys, values, ragged(groups), sinks)
        want = plain_paged_attention(q, keys, values, groups, sinks)
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@pytest.mark.skipif(not native.built(), reason="the compiled kernels do not run here")
@torch.inference_mode()
def test_the_kernel_sees_long_texts_and_many_queries_and_no_number_of_threads() -> None:
    q, keys, values = some((70, 4, 64), 0), some((40, 16, 2, 64), 1), some((40, 16, 2, 64), 2)
    pages = torch.randperm(40, generator=torch.Generator().manual_seed(0))[None]
    group = PagedGroup(torch.arange(70)[None], pages, torch.arange(500, 570)[None])
    keys[pages[0, -1]], values[pages[0, -1]] = torch.nan, torch.nan  # beyond position 624: nobody sees it
    want, threads = plain_paged_attention(q, keys, values, [group]), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(native.attend(q, keys, values, ragged([group])))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[0], want, rtol=0, atol=1e-5)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@torch.inference_mode()
def test_heads_that_are_too_wide_for_the_kernel_are_not_its_business() -> None:
    pages = torch.zeros(1, 16, 1, native.WIDEST_HEAD)
    assert native.attends(pages) == native.built()
    wide = torch.zeros(1, 16, 1, native.WIDEST_HEAD + 16)
    assert not native.attends(wide)
    each = torch.zeros(1, dtype=torch.long)
    with pytest.raises(AssertionError):
        native.attend(wide[0, :1], wide, wide, native.Ragged(each, each + 1, torch.arange(2), each, each))


@pytest.mark.skipif(not native.built(), reason="the compiled kernels do not run here")
@pytest.mark.parametrize("where", ["q", "keys", "values"])
@torch.inference_mode()
def test_a_number_that_is_none_does_not_hide(where: str) -> None:
    parts = {"q": some((1, 2, 32), 0), "keys": some((2, 16, 1, 32), 1), "values": some((2, 16, 1, 32), 2)}
    parts[where][0] = torch.nan
    group = PagedGroup(torch.tensor([[0]]), torch.tensor([[0, 1]]), torch.tensor([[20]]))
    assert native.attend(parts["q"], parts["keys"], parts["values"], ragged([group])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_rows_are_written_where_they_belong_and_nowhere_else(dtype: torch.dtype) -> None:
    wide, v = some((5, 6, 8), 0, dtype), some((5, 2, 8), 1, dtype)
    k, rows, slots = wide[:, 2:4], torch.tensor([0, 2, 4]), torch.tensor([7, 0, 11])
    pools = [[torch.zeros(3, 4, 2, 8, dtype=dtype) for _ in range(2)] for _ in range(2)]
    write_pages(k, v, rows, slots, *pools[0])
    plain_write_pages(k, v, rows, slots, *pools[1])
    assert all(torch.equal(one, other) for one, other in zip(*pools, strict=True))
    assert int((pools[0][0].flatten(0, 1).abs().sum((1, 2)) > 0).sum()) == 3
