"""What is compared: the same sessions for all, pools counted by hand, and what is refused."""

import math
from dataclasses import replace

import pytest

from heliostat.bench.comparison import IN_FLIGHT, LOAD, Comparison, Variant, quick
from heliostat.bench.systems import SYSTEMS, member_names
from heliostat.bench.workloads import Lengths, prompt_ids
from heliostat.errors import Refused

EVEN = Lengths(context=64, role=0, answer=16, observation=16, spread=0)


def comparison(*names: str, members: int = 2, **more: object) -> Comparison:
    load = replace(LOAD, members=member_names(members), sessions=6)
    made = Comparison(systems=tuple(SYSTEMS[name] for name in names), load=load)
    return replace(made, **more)  # type: ignore[arg-type]


def test_a_points_sessions_are_the_same_every_time_and_no_two_points() -> None:
    it = comparison("independent", "icarus")
    assert it.sessions(3, rate=2.0) == it.sessions(3, rate=2.0)
    first, second = ({tuple(prompt_ids(s.calls[0], {})) for s in it.sessions(n)} for n in (3, 4))
    assert not first & second
    assert {session.start for session in it.at_once(3, 4)} == {0.0}


def test_counts_of_one_session_are_those_of_a_hand() -> None:
    # Three calls in turns of two members over 64, 80 and 112 tokens, in pages of 16; answers of 16, 16 and 8.
    it = comparison("independent", "prefillshare", "icarus")
    it = replace(it, load=replace(it.load, turns=1, lengths=EVEN, sessions=1))
    (session,) = it.sessions(0)
    assert [len(prompt_ids(call, {})) for call in session.calls] == [64, 80, 112]
    found = it.counted([session])
    assert all(each.prompt == 256 for each in found.values())
    # The third call goes to the first's member: its prompt's 64 and, without the last token, its answer's no whole page.
    assert found["independent"].prefill == 64 + 80 + (112 - 64)
    # The base wrote 63 of the first prompt and 79 of the second: three whole pages, then four, whoever asked.
    assert found["prefillshare"].prefill == 64 + (80 - 48) + (112 - 64)
    assert found["icarus"].prefill <= found["prefillshare"].prefill
    assert found["icarus"].answer_rows == 2 * found["independent"].answer_rows == 80


def test_a_pool_holds_what_the_thriftiest_system_has_to_keep() -> None:
    it = comparison("independent", "icarus", members=4)
    sample = it.sessions(0, how_many=50)
    kept = {name: found.kept / 50 for name, found in it.counted(sample).items()}
    assert kept["icarus"] < kept["independent"]
    assert it.pages() == math.ceil(IN_FLIGHT * kept["icarus"] / 16)
    assert it.changed(Variant("small", pool="tight")).pages() == math.ceil(8 * kept["icarus"] / 16)


def test_a_pool_is_never_too_small_for_a_request() -> None:
    it = comparison("independent", "icarus")
    it = replace(it, pool="tight", load=replace(it.load, turns=1, lengths=replace(EVEN, context=5000)))
    assert it.pages() >= 4 * 5000 / 16


def test_a_variant_changes_one_thing() -> None:
    it = comparison("independent", "icarus")
    assert it.changed(Variant("first", {"role_place": "first"})).load == replace(it.load, role_place="first")


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="no pool 'big'"):
        comparison("independent", "sun", pool="big")
    with pytest.raises(Refused, match="no pool 'big'"):
        comparison("independent", "sun", variants=(Variant("x", pool="big"),))
    with pytest.raises(Refused, match="loads are"):
        comparison("independent", "sun", loads=(0.0,))


def test_points_are_counted_and_a_quick_one_has_few() -> None:
    it = comparison("independent", "multilora", "icarus")
    assert it.points == 3 * 5 + 3 * 5 * 3 + 3 * 4 + 5 * 4
    assert quick(it).points == 3 * 2 + 3 * 5 + 3
    assert quick(it).seconds(1.0) < it.seconds(1.0)
