"""The look-up finds what followed before, and is its plain twin."""

from hypothesis import given
from hypothesis import strategies as st

from heliostat.engine.request import Request
from heliostat.engine.speculation.drafting import LookUp
from heliostat.engine.speculation.ngram import REACH, SHORTEST, Index, plain_look_up
from heliostat.family import Row

TOKENS = st.lists(st.integers(0, 3), max_size=40)


@given(TOKENS, TOKENS, st.integers(1, 6))
def test_it_is_its_twin_however_the_text_came(first: list[int], second: list[int], most: int) -> None:
    index = Index()
    index.extend(first)
    assert index.look_up(most) == plain_look_up(first, most)
    index.extend(second)
    assert index.look_up(most) == plain_look_up(first + second, most)
    assert index.tokens == first + second


def test_what_followed_the_longest_and_latest_is_taken() -> None:
    assert plain_look_up([1, 2, 9, 1, 2, 8, 1, 2], 1) == [8]
    assert plain_look_up([7, 1, 2, 9, 6, 1, 2, 8, 7, 1, 2], 2) == [9, 6]
    assert plain_look_up([1, 2, 3], 4) == [] == plain_look_up([1] * (SHORTEST - 1), 4)


def test_what_repeats_itself_goes_on() -> None:
    assert plain_look_up([5, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert plain_look_up([4, 4, 4], 3) == [4, 4, 4]


def test_of_a_long_prompt_the_end_is_looked_at() -> None:
    far = (1, 2, 3, *range(10, 10 + REACH), 1, 2)
    near = (*range(10, 10 + REACH), 1, 2, 3, 4, 1, 2)
    for prompt, found in ((far, 0), (near, 2)):
        row = Row("a", "a", "a", "a")
        request = Request("r", row=row, digests={}, prompt=prompt)
        look = LookUp()
        assert look.most(request, 2) == found
        request.answer += [7, 7]
        assert look.most(request, 2) == 0
        look.forget("r")
        assert not look._texts and not look._found
