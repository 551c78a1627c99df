"""Where prompts of different members part: how many tokens they have in common, and why nothing is shared."""

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.engine import prefixes as made
from heliostat.engine.page_table import PageTable
from heliostat.engine.prefixes import Prefixes, common_tokens
from heliostat.engine.request import Request, Sampling
from heliostat.family import SHARINGS

S = 4
LONG = list(range(10))


def asked(
    member: str, tokens: Sequence[int], sharing: str = "icarus", *, salt: str = "", choice: int = 0
) -> Request:
    row = SHARINGS[sharing].instantiate(f"{member}.own")
    return Request(
        f"{member}-{len(tokens)}",
        row=row,
        digests={name: f"digest of {name}" for name in row.modules},
        prompt=tuple(tokens),
        sampling=Sampling(choice=choice),
        member=member,
        salt=salt,
    )


def met(*requests: Request) -> Prefixes:
    prefixes = Prefixes(page_size=S)
    for request in requests:
        prefixes.meet(request)
    return prefixes


@pytest.mark.parametrize(
    ("first", "second", "outcome", "common", "shared"),
    [
        (asked("a", LONG), asked("b", LONG), "shared", 10, 8),
        (asked("a", LONG), asked("b", [*LONG[:6], 99, 99, 99]), "shared", 6, 4),
        (asked("a", LONG), asked("b", [*LONG[:3], 99, 99, 99]), "early", 3, 0),
        (asked("a", LONG), asked("b", [99, *LONG]), "early", 0, 0),
        (asked("a", LONG), asked("b", LONG[:3]), "short", 3, 0),
        (asked("a", LONG, "independent"), asked("b", LONG), "writer", 10, 0),
        (asked("a", LONG, "sun"), asked("b", LONG, "sun"), "writer", 10, 0),
    ],
)
def test_each_way_in_which_two_prompts_meet(
    first: Request, second: Request, outcome: str, common: int, shared: int
) -> None:
    for order in ([first, second], [second, first]):
        (found,) = met(*order).pairs.values()
        assert dict(found.outcomes) == {outcome: 1}
        assert (found.count, found.common, found.shared) == (1, common, shared)
        assert found.tokens == len(order[1].prompt)


def test_the_closest_of_the_latest_prompts_counts() -> None:
    far = [asked("a", [99 + n, *LONG]) for n in range(5)]
    found = met(far[0], asked("a", LONG), *far[1:], asked("b", LONG), asked("b", LONG))
    assert found.pairs["a", "b"].common == 20
    forgotten = met(asked("a", LONG), *[asked("a", [99, n]) for n in range(made.LATEST)], asked("b", LONG))
    assert forgotten.pairs["a", "b"].common == 0


def test_tenants_meet_nobody_and_choices_are_one_request() -> None:
    assert not met(asked("a", LONG, salt="one"), asked("b", LONG, salt="two")).pairs
    found = met(asked("a", LONG), *[asked("b", LONG, choice=n) for n in range(3)])
    assert found.pairs["a", "b"].count == 1
    assert not met(asked("a", LONG), asked("a", LONG)).pairs


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made, "MOST_MEMBERS", 5)
    monkeypatch.setattr(made, "MOST_PAIRS", 7)
    monkeypatch.setattr(made, "LONGEST", 6)
    found = met(*[asked(f"m{n}", LONG) for n in range(40)])
    assert len(found._latest) == 5 and len(found.pairs) == 7
    assert all(len(p.packed) == 6 * 4 for prompts in found._latest.values() for p in prompts)
    assert ("m38", "m39") in found.pairs and ("m0", "m1") not in found.pairs


TOKENS = st.lists(st.integers(0, 2), max_size=40)


@given(shared=st.lists(st.integers(0, 2), max_size=200), one=TOKENS, other=TOKENS)
def test_common_tokens_are_those_that_one_counts(shared: list[int], one: list[int], other: list[int]) -> None:
    one, other = shared + one, shared + other
    counted = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    packed = [struct.pack(f"<{len(tokens)}I", *tokens) for tokens in (one, other)]
    assert common_tokens(*packed) == (min(len(one), len(other)) if counted is None else counted)


ROWS = st.sampled_from(sorted(SHARINGS))


@given(one=TOKENS.filter(bool), other=TOKENS.filter(bool), rows=st.tuples(ROWS, ROWS))
def test_what_is_called_shared_is_what_the_page_table_shares(
    one: list[int], other: list[int], rows: tuple[str, str]
) -> None:
    first, second = asked("a", one, rows[0]), asked("b", other, rows[1])
    table = PageTable(50, page_size=S)
    first.pages += table.allocate(table.pages_for(first.length))
    for page in range(first.length // S):
        table.publish(first, page)
    # The table never takes the last known token from the cache: with one more, it may take the whole prompt.
    second.answer.append(99)
    keyed = [page for page in table.match(second) if page < 50 and second.boundary >= S]
    within = min(len(keyed), min(first.boundary, second.boundary) // S)
    (found,) = met(first, second).pairs.values()
    assert found.shared == within * S and (found.outcomes["shared"] > 0) == (within > 0)
