"""Rules read from texts, and written as they are read."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.engine.speculation.rule import LOSSLESS, WINDOW, Rule, Speculated, parse_rule
from heliostat.errors import Refused


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("lossless", LOSSLESS),
        ("judged", Rule("judged")),
        ("judged:0.7", Rule("judged", 0.7)),
        ("judged:inf", Rule("judged", math.inf)),
        ("judged:recall", Rule("judged", named="recall")),
        ("kl:0.1", Rule("kl", 0.1)),
        ("topk:3", Rule("topk", 3)),
        ("entropy:0.3", Rule("entropy", 0.3, WINDOW)),
        ("entropy:0.3:5", Rule("entropy", 0.3, 5)),
        (" topk:3 ", Rule("topk", 3)),
    ],
)
def test_rules_are_read(text: str, rule: Rule) -> None:
    assert parse_rule(text) == rule == parse_rule(str(rule))
    assert rule.lossless == (text == "lossless")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "exact",
        "lossless:1",
        "judged:",
        "judged:2",
        "judged:nan",
        "judged:a:b",
        "kl",
        "kl:-1",
        "kl:inf",
        "kl:x",
        "topk",
        "topk:0",
        "topk:1.5",
        "topk:-3",
        "entropy",
        "entropy:2",
        "entropy:0.3:0",
        "entropy:0.3:1:1",
        "off",
    ],
)
def test_others_are_refused_with_all_there_are(text: str) -> None:
    with pytest.raises(
        Refused, match=r"there is: lossless, judged \(or judged:THETA\), kl:BOUND, topk:COUNT"
    ):
        parse_rule(text)


@given(st.text(max_size=12))
def test_no_text_does_anything_but_be_read_or_refused(text: str) -> None:
    try:
        rule = parse_rule(text)
    except Refused:
        return
    assert parse_rule(str(rule)) == rule


@given(st.floats(0, 1), st.floats(0, 1e9))
def test_a_bound_travels_as_it_is(share: float, nats: float) -> None:
    for rule in (Rule("judged", share), Rule("kl", nats), Rule("entropy", share, 4)):
        assert parse_rule(str(rule)) == rule


def test_counts_add_up() -> None:
    told = Speculated()
    told.add(3, 2, 1)
    told.add(1, 0, 0)
    assert told == Speculated(4, 2, 1)
