"""Sessions: the same seed gives the same ones, rates are right, prompts begin alike exactly as far as declared."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.bench.workloads import (
    CONTENT,
    MARKS,
    WORDS,
    WORKFLOWS,
    Lengths,
    Load,
    declared_common,
    messages,
    popularity_named,
    prompt_ids,
    respelled,
    sessions,
)
from heliostat.errors import Refused

SHORT = Lengths(context=24, role=6, answer=8, observation=10)
loads = st.builds(
    Load,
    members=st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True).map(tuple),
    workflow=st.sampled_from(sorted(WORKFLOWS)),
    sessions=st.integers(1, 5),
    seed=st.integers(0, 99),
    lengths=st.builds(Lengths, context=st.integers(1, 30), role=st.integers(0, 9), answer=st.integers(1, 9)),
    turns=st.integers(1, 3),
    width=st.integers(1, 4),
    role_place=st.sampled_from(["first", "last", "kept"]),
    popularity=st.floats(0, 2),
    assignment=st.sampled_from(["cast", "rotate", "draw"]),
    switch=st.floats(0, 1),
)


def load(**options: Any) -> Load:
    return Load(**{"members": ("a", "b", "c"), "lengths": SHORT, **options})


def common(one: list[int], other: list[int]) -> int:
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


@given(loads)
def test_the_same_seed_gives_the_same_sessions(load: Load) -> None:
    assert sessions(load) == sessions(load)
    assert sessions(load)[0].calls[0].prompt != sessions(replace(load, seed=load.seed + 1))[0].calls[0].prompt


@given(loads)
def test_prompts_begin_alike_exactly_as_far_as_declared(load: Load) -> None:
    for session in sessions(load):
        for one in session.calls:
            for other in session.calls:
                alike = common(prompt_ids(one, {}), prompt_ids(other, {}))
                declared = declared_common(one, other)
                # Where both go on with drawn ids, these may happen to be the same.
                assert alike >= declared
                mine, theirs = (prompt_ids(call, {})[declared : declared + 1] for call in (one, other))
                if mine and theirs and (mine[0] in MARKS or theirs[0] in MARKS):
                    assert alike == declared


@given(loads)
def test_calls_go_on_from_what_was_said_before_and_end_in_its_stead(load: Load) -> None:
    for session in sessions(load):
        for call in session.calls:
            spoken = [part.answer_of for part in call.prompt if part.answer_of is not None]
            assert tuple(spoken) == call.after and all(number < call.number for number in spoken)
            assert call.answer_tokens == len(call.stand_in) >= 1
            assert all(token in CONTENT for token in call.stand_in)


@given(loads, st.text(max_size=4))
def test_another_spelling_begins_alike_as_far_and_no_cache_has_met_it(load: Load, nonce: str) -> None:
    made = sessions(load)
    other = respelled(made, nonce)
    assert other == respelled(made, nonce) and other != respelled(made, nonce + "x")
    one, two = ([prompt_ids(c, {}) for s in some for c in s.calls] for some in (made, other))
    for place, (mine, theirs) in enumerate(zip(one, two, strict=True)):
        assert len(mine) == len(theirs)
        assert common(one[0], mine) == common(two[0], theirs), place


@pytest.mark.parametrize(
    ("workflow", "tasks"),
    [
        ("react", ["planner", "actor", "observer"] * 2),
        ("reflexion", ["actor", "evaluator", "reflector"] * 2),
        ("fanout", ["planner", "worker 1", "worker 2", "joiner"] * 2),
    ],
)
def test_a_workflow_is_what_it_is_called(workflow: str, tasks: list[str]) -> None:
    (session,) = sessions(load(workflow=workflow, sessions=1, turns=2, width=2))
    assert [call.task for call in session.calls] == tasks
    if workflow == "fanout":
        assert session.calls[1].after == session.calls[2].after == (0,)
        assert session.calls[3].after == (0, 1, 2)


def test_a_role_in_front_parts_members_at_their_first_token_and_behind_it_parts_nothing() -> None:
    for place in ("first", "last"):
        (session,) = sessions(load(sessions=1, role_place=place, lengths=replace(SHORT, spread=0)))
        planner, actor = session.calls[:2]
        shared = common(prompt_ids(planner, {}), prompt_ids(actor, {}))
        assert shared == (0 if place == "first" else SHORT.context)


def test_a_role_that_is_kept_stands_before_the_answer_it_asked_for() -> None:
    (session,) = sessions(load(sessions=1, role_place="kept"))
    planner, actor = session.calls[:2]
    assert (
        actor.prompt[: len(planner.prompt)] == planner.prompt
        and actor.prompt[len(planner.prompt)].answer_of == 0
    )
    assert declared_common(planner, actor) == len(prompt_ids(planner, {}))


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    starts = [session.start for session in sessions(load(rate=4, sessions=4000, turns=1))]
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    assert fmean(gaps) == pytest.approx(0.25, rel=0.05)
    assert fmean(gap * gap for gap in gaps) == pytest.approx(2 * 0.25**2, rel=0.12)


def test_lengths_and_pauses_have_their_means() -> None:
    made = sessions(load(sessions=800, turns=1, pause=2.0, lengths=replace(SHORT, context=100, spread=0.5)))
    contexts = [len(session.calls[0].prompt[0].ids) for session in made]
    assert fmean(contexts) == pytest.approx(100, rel=0.05) and min(contexts) >= 50 and max(contexts) <= 150
    assert fmean(session.calls[2].pause for session in made) == pytest.approx(2.0, rel=0.12)
    assert all(session.calls[0].pause == 0 for session in made)


def test_members_are_asked_as_often_as_zipf_says() -> None:
    made = sessions(load(sessions=2000, turns=1, assignment="draw", popularity=1.0))
    asked = Counter(call.member for session in made for call in session.calls)
    whole = 1 + 1 / 2 + 1 / 3
    for place, member in enumerate("abc"):
        assert asked[member] / asked.total() == pytest.approx(1 / (place + 1) / whole, rel=0.1)


def test_rotation_goes_round_and_a_switch_rate_holds() -> None:
    (session,) = sessions(load(sessions=1, assignment="rotate"))
    order = "abcabc"
    assert all(one.member + other.member in order for one, other in pairwise(session.calls))
    made = sessions(load(sessions=400, assignment="rotate", switch=0.25))
    changes = [a.member != b.member for session in made for a, b in pairwise(session.calls)]
    assert fmean(changes) == pytest.approx(0.25, rel=0.15)


def test_a_cast_has_a_member_for_each_task() -> None:
    for session in sessions(load(sessions=20)):
        assert len({(call.task, call.member) for call in session.calls}) == 3


def test_words_are_as_many_as_ids_and_answers_stand_where_they_were_said() -> None:
    (session,) = sessions(load(sessions=1))
    last = session.calls[-1]
    told = messages(last, {0: "what was said"})
    assert told[1] == {"role": "assistant", "content": "what was said"}
    assert len(told[0]["content"].split()) == len(last.prompt[0].ids)
    assert len(set(WORDS)) == len(WORDS) == 256
    ids = prompt_ids(last, {0: [1, 2, 3]})
    assert ids[len(last.prompt[0].ids) :][:3] == [1, 2, 3]


@pytest.mark.parametrize(
    "options",
    [
        {"members": ()},
        {"members": ("a", "a")},
        {"workflow": "rect"},
        {"rate": 0},
        {"switch": 1.5},
        {"assignment": "random"},
        {"role_place": "middle"},
        {"width": 65},
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=str(next(iter(options)))):
        load(**options)


def test_popularity_by_name() -> None:
    assert (popularity_named("uniform"), popularity_named("zipf:1.2")) == (0.0, 1.2)
    for name in ("zipf", "zipf:x", "zipf:-1", "uniform:2", "zipf:nan"):
        with pytest.raises(Refused, match="popularity"):
            popularity_named(name)
