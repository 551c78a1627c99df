"""Who has which beginning: chains of keys, bounded as pools are, as a plain search would find it."""

import random

from hypothesis import given
from hypothesis import strategies as st

from heliostat.serve.router_places import Places, pages_of, prefix_keys

PAGE = 4


def keys(tokens: list[int], writer: str = "w", salt: str = "") -> tuple[int, ...]:
    return prefix_keys(tokens, writer=writer, salt=salt, page_size=PAGE)


@given(st.lists(st.integers(0, 2), max_size=90), st.lists(st.integers(0, 2), max_size=90))
def test_keys_are_equal_exactly_as_far_as_the_tokens_are(one: list[int], other: list[int]) -> None:
    common = next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    alike = sum(a == b for a, b in zip(keys(one), keys(other), strict=False))
    assert pages_of(alike) <= common // PAGE
    assert alike == len(keys(one[: common // PAGE * PAGE])), "nothing that is common is missed"


def test_writer_and_salt_make_other_keys_and_cannot_be_shifted_into_each_other() -> None:
    tokens = list(range(8))
    found = [keys(tokens, w, s) for w, s in [("a", "b"), ("a", ""), ("ab", ""), ("", "ab"), ("a:", "b")]]
    assert len({key for one in found for key in one}) == 10


def test_the_first_pages_have_a_key_each_and_long_prompts_have_few() -> None:
    assert [pages_of(n) for n in range(10)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert len(keys(list(range(8192)))) < 50
    for pages in range(1, 300):
        have = pages_of(len(keys([0] * pages * PAGE)))
        assert have <= pages < have * 1.25 + 1, "at most a fifth is not seen"


def test_each_worker_is_told_as_many_pages_as_it_has_and_loses_the_longest_unused() -> None:
    places, dice = Places(), random.Random(0)
    room = {0: 10, 1: 40}
    for _ in range(300):
        place = dice.randrange(2)
        prompt = [dice.randrange(3) for _ in range(dice.randrange(4, 100))]
        places.note(place, keys(prompt), room=room[place])
        assert places._known[place].pages <= room[place]
        assert len(places) <= sum(len(known.keys) for known in places._known.values())
    prompt = [9] * 8 * PAGE
    places.note(0, keys(prompt), room=10)
    places.note(1, keys(prompt[: 4 * PAGE]), room=40)
    assert places.along(keys(prompt)) == [0b11] * 4 + [0b01] * 4
    places.note(0, keys([8] * 7 * PAGE), room=10)
    assert [who & 1 for who in places.along(keys(prompt))] == [1, 1, 1, 0], "the end of it went first"
    for place in (0, 1):
        places.forget(place)
    assert len(places) == 0 and places.along(keys(prompt)) == []
