"""The graders: what counts as right, at the edges of numbers, words and JSON."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import Refused
from heliostat.tasks.grade import final_answer, grade

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1000, 1000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.text())
def test_exact_forgives_outer_white_space_only(text: str) -> None:
    assert grade("exact", f" \n{text}\t", text)
    assert not grade("exact", text + "x", text)


@pytest.mark.parametrize(
    "answer",
    [
        "12",
        "so 12.",
        "it is 12, i think",
        "x=12",
        "$12",
        "(12)",
        "12 + 0",
        "answer: 12",
        "1 2 12",
        "**12**",
        "12%",
    ],
)
def test_a_number_is_contained_as_a_whole_number(answer: str) -> None:
    assert grade("contains", answer, "7 + 5 = 12. answer: 12")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "312",
        "123",
        "12.5",
        "3.12",
        "1,12",
        "12,500",
        "-12",
        "12th",
        "a12",
        "1 2",
        "12_",
        "answer: 13",
        "twelve",
    ],
)
def test_a_part_of_another_number_is_no_number(answer: str) -> None:
    assert not grade("contains", answer, "7 + 5 = 12. answer: 12")


def test_a_number_on_the_way_to_a_wrong_result_is_no_hit() -> None:
    assert not grade("contains", "7 + 5 = 12, 12 + 1 = 13. answer: 13", "answer: 12")
    assert not grade("contains", "answer: 12. no, answer: 13", "answer: 12")
    assert grade("contains", "7 + 5 = 12, 12 + 1 = 13", "12")


def test_negative_numbers_and_words() -> None:
    assert grade("contains", "it is -3.", "answer: -3")
    assert not grade("contains", "it is 3.", "answer: -3")
    assert not grade("contains", "5-3", "answer: -3")
    assert grade("contains", "In PARIS, surely", "answer: paris")
    assert not grade("contains", "comparison", "answer: paris")
    assert grade("contains", "c++ it is", "c++")


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("answer: 12", "12"),
        ("1 + 1 = 2\nAnswer: 2.\n", "2"),
        ("the answer is: 2", "2"),
        ("work\n#### 72", "72"),
        ("answer: 3\nanswer: 4\nso much for that", "4"),
        ("first line\nlast line", "last line"),
        (" paris. ", "paris"),
        ("", ""),
    ],
)
def test_final_answer(text: str, final: str) -> None:
    assert final_answer(text) == final


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_contains_is_equality_of_numbers(one: int, two: int) -> None:
    assert grade("contains", f"the result is {one}.", f"answer: {two}") == (one == two)


@given(json_values)
def test_a_command_is_right_in_any_layout(value: object) -> None:
    def turned(item: object) -> object:
        if isinstance(item, dict):
            return {key: turned(item[key]) for key in reversed(item)}
        return [turned(x) for x in item] if isinstance(item, list) else item

    reference = json.dumps(value)
    assert grade("command", json.dumps(turned(value), indent=3, ensure_ascii=False), reference)
    assert not grade("command", f"call: {reference}", reference)


@given(json_values, json_values)
def test_different_values_are_different_commands(one: object, two: object) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)
    assert grade("command", json.dumps(one), json.dumps(two)) == same


@pytest.mark.parametrize(
    "answer",
    ['{"a": true}', '{"a": 1.0}', '{"a": "1"}', '{"a": 1, "a": 1}', "{'a': 1}", "", "{", "NaN", "[" * 10**5],
)
def test_what_is_not_the_same_json_is_wrong(answer: str) -> None:
    assert not grade("command", answer, '{"a": 1}')


def test_a_wish_that_cannot_be_graded_is_refused() -> None:
    with pytest.raises(Refused, match="exact, contains, command"):
        grade("bleu", "a", "a")
    with pytest.raises(Refused, match="needs a JSON reference"):
        grade("command", "{}", "{")
    with pytest.raises(Refused, match="final answer"):
        grade("contains", "12", "  ")
