"""What an operator may say of drafts, and what requests may then ask for."""

from typing import Any

import msgspec
import pytest

from heliostat.engine.speculation.rule import LOSSLESS, Rule
from heliostat.engine.speculation.wanted import Wanted
from heliostat.errors import Refused


def test_nothing_is_drafted_where_nobody_says() -> None:
    assert Wanted().rule(None) is None and Wanted().rule("off") is None
    with pytest.raises(Refused, match="nothing is drafted here"):
        Wanted().rule("lossless")


def test_the_first_rule_is_for_those_that_do_not_say() -> None:
    wanted = Wanted(draft="small", verify=("judged", "kl:0.1"))
    assert wanted.rule(None) == Rule("judged")
    assert wanted.rule("kl:0.1") == wanted.rule("kl:0.10") == Rule("kl", 0.1)
    assert wanted.rule("lossless") == LOSSLESS
    assert wanted.rule("off") is None
    assert Wanted(draft="small").rule(None) == LOSSLESS
    with pytest.raises(
        Refused, match="'kl:0.2' is not allowed here.*allowed is: lossless, judged, kl:0.1, off"
    ):
        wanted.rule("kl:0.2")


def test_the_look_up_is_no_module() -> None:
    assert Wanted(draft="small").module == "small"
    assert Wanted(draft="ngram").module is None and Wanted().module is None


@pytest.mark.parametrize(
    "said",
    [
        {"verify": ("lossless",)},
        {"judge": "mine"},
        {"draft": "a", "judge": "mine"},
        {"draft": "a", "verify": ("b",)},
    ],
)
def test_what_cannot_be_meant_is_refused(said: dict[str, Any]) -> None:
    with pytest.raises(Refused):
        Wanted(**said)


def test_it_travels() -> None:
    wanted = Wanted(draft="small", verify=("judged", "kl:0.1"), judge="mine", ahead=3, adaptive=False)
    assert msgspec.json.decode(msgspec.json.encode(wanted), type=Wanted) == wanted
