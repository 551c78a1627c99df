"""What is counted is what the engine's page table finds, request by request; and what is in flight, by hand."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.bench.counting import Case, cases, count
from heliostat.bench.logs import Log, Logged, pack
from heliostat.bench.workloads import Lengths, Load, prompt_ids, sessions
from heliostat.engine.page_table import PageTable
from heliostat.engine.request import Request
from heliostat.family import SHARINGS, Row

S = 4
few = st.lists(st.integers(0, 1), min_size=1, max_size=14)
asked = st.lists(st.tuples(st.sampled_from("ab"), few, few), min_size=1, max_size=8)
MIXED = Case(
    "mixed",
    {"a": SHARINGS["icarus"].instantiate("a.own"), "b": SHARINGS["prefillshare"].instantiate("b.own")},
)


def logged(member: str, prompt: Sequence[int], answer: Sequence[int] = (), **facts: Any) -> Logged:
    given = {"time": 0.0, "answer": pack(answer) if answer else None, **facts}
    return Logged(
        member=member, prompt_tokens=len(prompt), answer_tokens=len(answer), prompt=pack(prompt), **given
    )


def found_by_the_engine(case: Case, requests: Sequence[tuple[str, list[int], list[int]]]) -> PageTable:
    """A page table that has served them one after the other, from a pool that never runs out."""
    table = PageTable(1000, page_size=S)
    for number, (member, prompt, answer) in enumerate(requests):
        row: Row = case.rows[member]
        digests = {name: name for name in row.modules}
        request = Request(str(number), row=row, digests=digests, prompt=tuple(prompt), member=member)
        found = table.match(request)
        table.take(request, found)
        request.answer += answer
        written = request.length - 1
        request.pages = [*found, *table.allocate(table.pages_for(written) - len(found))]
        for place in range(len(found), written // S):
            table.publish(request, place)
        table.release(request.pages)
    return table


@given(asked)
def test_as_the_page_table_finds_it(requests: list[tuple[str, list[int], list[int]]]) -> None:
    log = Log([logged(*each, time=float(n)) for n, each in enumerate(requests)])
    wanted = [*cases("ab"), MIXED]
    for case, counted in zip(wanted, count(log, wanted, size=S), strict=True):
        table = found_by_the_engine(case, requests)
        assert counted.cached == table.counters.hit_tokens, case.name
        assert counted.cached_other == sum(table.counters.shared_hits.values()), case.name
        if all(row.answers_become_prompts for row in case.rows.values()):
            assert counted.kept == S * sum(written.idle for written in table.pages_by_writer([]).values())


def test_a_workflow_shares_what_its_rows_allow() -> None:
    """Role last: the context is common. Of 64 + 3 x 16 tokens of an answered turn, by hand."""
    lengths = Lengths(context=64, role=16, answer=16, observation=16, spread=0)
    load = Load(members=("a", "b", "c"), sessions=1, turns=1, lengths=lengths)
    (session,) = sessions(load)
    requests = [(call.member, prompt_ids(call, {}), list(call.stand_in)) for call in session.calls]
    assert [len(prompt) for _, prompt, _ in requests] == [80, 96, 128]
    log = Log([logged(*each, time=float(n)) for n, each in enumerate(requests)])
    found = {counted.case: counted for counted in count(log, cases(log.members))}
    for name, (own, other) in {
        "independent": (0, 0),
        "sun": (0, 0),
        "prefillshare": (0, 64 + 80),  # the context; then it and the planner's answer, as the base read it
        "icarus": (0, 64 + 80),
    }.items():
        assert (found[name].cached_own, found[name].cached_other) == (own, other), name
    assert found["icarus"].answer_rows == 2 * found["sun"].answer_rows == 2 * found["icarus"].answer


def test_an_answer_that_comes_back_is_found_where_its_writer_writes_prompts() -> None:
    prompt, answer = [1] * 8, [2] * 9
    turns = [logged("a", prompt, answer, time=0.0), logged("a", [*prompt, *answer, 3, 3, 3], time=1.0)]
    found = {counted.case: counted.cached for counted in count(Log(turns), cases("a"), size=S)}
    assert found == {"independent": 16, "sun": 8, "prefillshare": 4, "icarus": 16}


def test_what_is_in_flight() -> None:
    """Two members with one prompt of 8 tokens at the same time: shared pages are held once."""
    both = [
        logged("a", [1] * 8, [2, 2], time=0.0, seconds=2.0),
        logged("b", [1] * 8, [3, 3], time=1.0, seconds=2.0),
    ]
    found = {counted.case: counted for counted in count(Log(both), cases("ab"), size=S)}
    assert {name: counted.peak for name, counted in found.items()} == {
        "independent": 24,  # each has two keyed pages and a third with its one written answer token
        "sun": 24,
        "prefillshare": 4 + 2 * 8,
        "icarus": 8 + 2 * 4,
    }
    # Alone for two of three seconds; together in one pass, or in two.
    assert {name: counted.batch for name, counted in found.items()} == pytest.approx(
        {"independent": 1.0, "sun": 4 / 3, "prefillshare": 1.0, "icarus": 4 / 3}
    )


def test_an_answer_is_there_when_it_has_ended() -> None:
    turns = [
        logged("a", [1] * 4, [2] * 5, time=0.0, seconds=5.0),
        logged("a", [1, 1, 1, 1, 2, 2, 2, 2, 9], time=1.0, seconds=1.0),
        logged("a", [1, 1, 1, 1, 2, 2, 2, 2, 9], time=6.0, seconds=1.0),
    ]
    (found,) = count(Log(turns[:2]), cases("a")[:1], size=S)
    assert found.cached == 4
    (found,) = count(Log(turns), cases("a")[:1], size=S)
    assert found.cached == 4 + 8


def test_text_and_ids_have_nothing_in_common() -> None:
    text = Logged(0.0, "a", 4, prompt=b"0123456789abcdef", kind="text")
    ids = Logged(1.0, "a", 5, prompt=b"0123456789abcdef0123")
    (found,) = count(Log([text, ids]), cases("a")[:1], size=S)
    assert found.cached == 0
