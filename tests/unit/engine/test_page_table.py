"""The page table: which pages may be reused by whom, who holds what, what is evicted, what is counted."""

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.engine.page_table import PageTable, Written, page_key
from heliostat.engine.request import Request
from heliostat.errors import Refused
from heliostat.family import SHARINGS

S = 4


def request(tokens, sharing="independent", *, member="math", prompt=None, digests=None, **fields):
    """A request of which ``prompt`` tokens (all, if None) are prompt and the rest answer."""
    row = SHARINGS[sharing].instantiate(f"{member}.own")
    n = len(tokens) if prompt is None else prompt
    digests = digests or {name: f"digest of {name}" for name in row.modules}
    return Request(
        f"{member}-{len(tokens)}",
        row=row,
        digests=digests,
        prompt=tuple(tokens[:n]),
        answer=list(tokens[n:]),
        member=member,
        **fields,
    )


def computed(table, r):
    """Pretend that all known tokens of r ran, in pages of its own, and publish what is full."""
    r.pages += table.allocate(table.pages_for(r.length))
    r.computed = r.length
    for index in range(r.length // table.page_size):
        table.publish(r, index)
    return r


def matched(table, r):
    return len(table.match(r)) * table.page_size


def test_the_key_depends_on_each_field():
    facts: dict[str, Any] = {"writer": "w", "tokens": (1, 2), "salt": "s"}
    keys = [
        page_key(b"", **facts),
        page_key(b"p", **facts),
        page_key(b"", **{**facts, "writer": "v"}),
        page_key(b"", **{**facts, "tokens": (2, 1)}),
        page_key(b"", **{**facts, "salt": ""}),
        page_key(b"", **{**facts, "writer": "ws", "salt": ""}),
    ]
    assert len(set(keys)) == len(keys) and {len(k) for k in keys} == {32}
    assert page_key(b"", **facts) == keys[0]


def test_a_key_is_the_same_in_every_process():
    def tagged(tag, value):
        return tag + len(value).to_bytes(8, "little") + value

    ids = b"".join(token.to_bytes(8, "little") for token in (1, 2))
    fields = tagged(b"P", b"before") + tagged(b"W", b"w") + tagged(b"T", ids) + tagged(b"S", b"s")
    assert page_key(b"before", writer="w", tokens=(1, 2), salt="s") == hashlib.sha256(fields).digest()


@pytest.mark.parametrize(("length", "expected"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_the_last_token_is_never_taken_from_the_cache(length, expected):
    table = PageTable(16, page_size=S)
    computed(table, request(range(12)))
    assert matched(table, request(range(length))) == expected


def test_a_match_ends_at_the_first_different_page():
    table = PageTable(16, page_size=S)
    computed(table, request(range(12)))
    other = [*range(4), 99, *range(5, 20)]
    assert matched(table, request(other)) == 4, "page 2 has equal tokens, but another page before it"


def test_different_tenants_members_and_weights_share_nothing():
    table = PageTable(16, page_size=S)
    computed(table, request(range(9), salt="one"))
    assert matched(table, request(range(9), salt="one")) == 8
    assert matched(table, request(range(9), salt="two")) == 0
    assert matched(table, request(range(9), salt="one", member="code")) == 0
    reloaded = {"math.own": "other weights under the same name"}
    assert matched(table, request(range(9), salt="one", digests=reloaded)) == 0


def test_equal_digests_share_whatever_their_names():
    table = PageTable(16, page_size=S)
    computed(table, request(range(9), digests={"math.own": "same"}))
    assert matched(table, request(range(9), member="code", digests={"code.own": "same"})) == 8


@pytest.mark.parametrize(
    (
        "sharing",
        "own",
        "others",
    ),  # tokens of an answered conversation found by the next turn of the same, other member
    [("independent", 16, 0), ("sun", 8, 0), ("prefillshare", 4, 4), ("icarus", 16, 16)],
)
def test_answers_are_prompts_exactly_where_their_writers_coincide(sharing, own, others):
    table = PageTable(16, page_size=S)
    computed(table, request(range(17), sharing, prompt=8))
    assert matched(table, request(range(20), sharing)) == own
    assert matched(table, request(range(20), sharing, member="code")) == others


def test_a_preempted_request_finds_its_own_answer_pages():
    table = PageTable(16, page_size=S)
    r = computed(table, request(range(17), "sun", prompt=8))
    table.release(r.pages)
    r.pages.clear()
    assert matched(table, r) == 16


def test_a_page_of_two_writers_and_all_after_it_have_no_key():
    table = PageTable(16, page_size=S)
    r = computed(table, request(range(17), "sun", prompt=6))
    assert [table.key_of(r, i) is None for i in range(4)] == [False, True, True, True]
    table.release(r.pages)
    assert matched(table, request(range(17), "sun", prompt=6)) == 4
    assert table.available() == 16


def test_a_key_before_the_page_is_full_is_our_mistake():
    table = PageTable(4, page_size=S)
    with pytest.raises(AssertionError, match="not full"):
        table.key_of(request(range(7)), 1)


def test_a_twin_stays_private():
    table = PageTable(8, page_size=S)
    first, twin = computed(table, request(range(5))), computed(table, request(range(5)))
    assert table.match(request(range(5))) == first.pages[:1]
    table.release(twin.pages)
    table.release(first.pages)
    assert table.match(request(range(5))) == first.pages[:1] and table.available() == 8


def test_a_page_with_two_holders_or_a_key_is_not_writable():
    table = PageTable(8, page_size=S)
    first = computed(table, request(range(5)))
    table.assert_writable(first.pages[1:])
    with pytest.raises(AssertionError, match="published"):
        table.assert_writable(first.pages)
    second = request(range(5))
    table.take(second, table.match(second))
    with pytest.raises(AssertionError, match="2 holders"):
        table.assert_writable(first.pages[:1])


def test_releasing_more_than_is_held_is_our_mistake():
    table = PageTable(2, page_size=S)
    pages = table.allocate(1)
    table.release(pages)
    with pytest.raises(AssertionError, match="more often than held"):
        table.release(pages)
    with pytest.raises(AssertionError, match="3 pages of 2"):
        table.allocate(3)


def test_the_longest_unused_goes_first_and_the_end_of_a_prefix_before_its_beginning():
    table = PageTable(4, page_size=S)
    old, new = computed(table, request(range(8))), computed(table, request(range(50, 58)))
    table.release(old.pages)
    table.release(new.pages)
    table.allocate(1)
    assert matched(table, request(range(9))) == 4 and matched(table, request(range(50, 59))) == 8
    table.allocate(1)
    assert matched(table, request(range(9))) == 0 and matched(table, request(range(50, 59))) == 8
    assert table.counters.evictions == 2


def test_use_keeps_a_page_and_a_held_page_is_never_evicted():
    table = PageTable(3, page_size=S)
    old, new = computed(table, request(range(4))), computed(table, request(range(50, 54)))
    table.release(old.pages)
    table.release(new.pages)
    again = request(range(5))
    cached = table.match(again)
    assert table.available() == 3 and table.available(without=cached) == 2
    table.take(again, cached)
    assert table.available() == 2
    table.allocate(2)
    assert matched(table, request(range(5))) == 4 and matched(table, request(range(50, 55))) == 0


def test_counters_say_who_used_whose_pages():
    table = PageTable(16, page_size=S)
    computed(table, request(range(9), "icarus", prompt=6))
    for member in ("math", "code", "code"):
        r = request(range(10), "icarus", member=member)
        table.take(r, table.match(r))
    assert table.counters.hit_tokens == 24
    assert table.counters.shared_hits == {("base", "code"): 16}
    preempted = request(range(10), "icarus", member="code", preemptions=1)
    table.take(preempted, table.match(preempted))
    assert table.counters.hit_tokens == 24, "what a preempted request finds again is no hit"


@pytest.mark.parametrize(("pages", "page_size"), [(0, 4), (4, 0), (-1, 4)])
def test_an_empty_pool_is_refused(pages, page_size):
    with pytest.raises(Refused, match=f"{pages} pages of {page_size}"):
        PageTable(pages, page_size=page_size)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 1), min_size=1, max_size=9),
            st.sampled_from(sorted(SHARINGS)),
            st.integers(1, 9),
            st.sampled_from(["math", "code"]),
        ),
        min_size=2,
        max_size=8,
    )
)
def test_keys_are_equal_exactly_when_tokens_and_writers_of_all_pages_are(facts):
    table = PageTable(1, page_size=2)
    by_key: dict[bytes | None, tuple] = {}
    by_chain: dict[tuple, bytes | None] = {}
    for tokens, sharing, prompt, member in facts:
        r = request(tokens, sharing, member=member, prompt=min(prompt, len(tokens)))
        for index in range(len(tokens) // 2):
            stop = 2 * (index + 1)
            chain = tuple((r.writer_of(p), tokens[p]) for p in range(stop))
            key = table.key_of(r, index)
            if any(chain[p][0] != chain[p + 1][0] for p in range(0, stop, 2)):
                assert key is None
            else:
                assert by_key.setdefault(key, chain) == chain
                assert by_chain.setdefault(chain, key) == key


def test_what_a_page_goes_on_from_is_found_no_less_often_even_where_its_finder_has_a_twin():
    table = PageTable(8, page_size=S)
    first, second = computed(table, request(range(9))), request(range(10))
    second.pages, second.computed = table.allocate(1), S  # it ran the first page itself, and finds the next
    second.pages += (found := table.match(second))
    table.take(second, found)
    assert found == first.pages[1:2]
    table.release(second.pages)
    table.release(first.pages)
    table.allocate(table.available() - 1)
    assert matched(table, request(range(9))) == 4, "the second page went first"


def test_pages_by_writer_are_held_or_idle_and_a_page_of_two_writers_is_the_firsts():
    table = PageTable(20, page_size=S)
    gone = computed(table, request(range(9), "icarus", member="a"))
    held = computed(table, request(range(50, 60), "prefillshare", member="b", prompt=6))
    table.release(gone.pages)
    # Of 9 tokens two pages are full, and stay; of 6 + 4 the boundary lies in the second of three.
    assert table.pages_by_writer([held]) == {"base": Written(held=2, idle=2), "b.own": Written(held=1)}
    table.release(held.pages)
    assert table.pages_by_writer([]) == {"base": Written(idle=3)}
