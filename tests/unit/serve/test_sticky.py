"""A conversation stays with the version that it began with, and new ones are dealt out by the exact share."""

from collections import Counter
from typing import Any

import pytest

from heliostat.family import Row
from heliostat.serve.dialect import ChatAsking, TextAsking
from heliostat.serve.roster import Roster, Version
from heliostat.serve.sticky import Sticky
from heliostat.serve.tools import Call

ROW = Row("b", "b", "b", "b")
USER: Any = {"role": "user", "content": "add"}


@pytest.fixture
def roster() -> Roster:
    made = Roster()
    made.add(Version("math", ROW, {"b": "one"}, "math"))
    made.try_out(Version("math", ROW, {"b": "two"}, "next"), share=0.25)
    return made


def chat(*messages: Any, **fields: Any) -> ChatAsking:
    return ChatAsking.model_validate({"model": "math", "messages": messages or [USER], **fields})


def ours(text: str | None, calls: Any = None) -> Any:
    return {"role": "assistant", "content": text, "tool_calls": calls}


def test_new_conversations_are_dealt_out_exactly_though_they_begin_alike(roster: Roster) -> None:
    sticky = Sticky()
    found = Counter(sticky.choose(roster, chat(), "").number for _ in range(40))
    assert found == {1: 30, 2: 10}
    bare = TextAsking.model_validate({"model": "math", "prompt": "add"})
    assert Counter(sticky.choose(roster, bare, "").number for _ in range(40)) == {1: 30, 2: 10}


def test_a_conversation_goes_on_with_who_answered_it(roster: Roster) -> None:
    sticky, last = Sticky(), {}
    for number in range(12):
        asking = chat()
        version = sticky.choose(roster, asking, "")
        answer = f"answer {number}"
        sticky.said(asking, version, "", [(answer, ()), (f"{answer} again", ())])
        last[answer] = version
    assert Counter(version.number for version in last.values()) == {1: 9, 2: 3}
    for _ in range(3):
        for answer, version in last.items():
            for said in (answer, f"{answer} again"):
                turns = [USER, ours(said), {"role": "user", "content": "go on"}]
                more = chat(*turns)
                assert sticky.choose(roster, more, "") == version
                sticky.said(more, version, "", [("more", ())])
                assert sticky.choose(roster, chat(*turns, ours("more"), USER), "") == version


def test_calls_that_come_back_say_who_made_them(roster: Roster) -> None:
    sticky = Sticky()
    asking = chat()
    canary = roster.seat("math").versions[1]
    sticky.said(asking, canary, "", [("", [Call("c1", "add", '{"b": 2, "a": 1}')])])
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1,"b":2}'}}
    turns = [USER, ours(None, [call]), {"role": "tool", "tool_call_id": "c1", "content": "3"}]
    assert {sticky.choose(roster, chat(*turns), "").number for _ in range(8)} == {2}
    other = [USER, ours(None, [{**call, "function": {"name": "sub", "arguments": "{}"}}])]
    assert {sticky.choose(roster, chat(*other, USER), "").number for _ in range(8)} == {1, 2}


def test_a_user_stays_and_users_are_dealt_out_exactly(roster: Roster) -> None:
    sticky = Sticky()
    users = [f"user {number}" for number in range(40)]
    first = {user: sticky.choose(roster, chat(user=user), "") for user in users}
    assert Counter(version.number for version in first.values()) == {1: 30, 2: 10}
    for user in users:
        assert sticky.choose(roster, chat(ours("x"), USER, user=user), "") == first[user]
        bare = TextAsking.model_validate({"model": "math", "prompt": "add", "user": user})
        assert sticky.choose(roster, bare, "") == first[user]


def test_the_same_name_of_another_tenant_is_somebody_else(roster: Roster) -> None:
    sticky = Sticky()
    found = [sticky.choose(roster, chat(user="alice"), f"salt {number}").number for number in range(4)]
    assert found == [1, 1, 1, 2]


def test_who_has_begun_before_a_canary_stays_and_leaves_with_the_version() -> None:
    roster, sticky = Roster(), Sticky()
    old = roster.add(Version("math", ROW, {"b": "one"}, "math"))
    asking = chat()
    sticky.said(asking, sticky.choose(roster, asking, ""), "", [("yes", ())])
    new = roster.try_out(Version("math", ROW, {"b": "two"}, "next"), share=1)
    going_on = chat(USER, ours("yes"), USER)
    assert sticky.choose(roster, going_on, "") == old
    assert sticky.choose(roster, chat(), "") == new
    roster.roll(Version("math", ROW, {"b": "two"}, "next"))
    assert sticky.choose(roster, going_on, "") == new


def test_a_version_that_is_asked_for_by_name_is_that_one(roster: Roster) -> None:
    sticky = Sticky()
    for _ in range(4):
        assert sticky.choose(roster, chat(model="math@v2", user="u"), "").number == 2
    assert len(sticky) == 0


def test_it_remembers_no_more_than_it_may(roster: Roster) -> None:
    sticky = Sticky(limit=3)
    for number in range(10):
        sticky.choose(roster, chat(user=str(number)), "")
    assert len(sticky) == 3
