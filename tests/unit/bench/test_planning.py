"""The plan: do not switch where nothing is won, roles in front are found and moved, busy times by hand."""

from dataclasses import replace
from typing import Any

from heliostat.bench.counting import cases
from heliostat.bench.logs import Log, Logged, pack
from heliostat.bench.parting import guessed_roles, moved, pairs
from heliostat.bench.plan_page import sentence, tables
from heliostat.bench.planning import WINDOWS, plan
from heliostat.bench.workloads import Lengths, Load, prompt_ids, sessions


def log_of(load: Load, **facts: Any) -> Log:
    """The sessions one after the other, calls a second apart."""
    return Log(
        [
            Logged(
                time=100.0 * session.number + call.number,
                member=call.member,
                prompt_tokens=len(ids := prompt_ids(call, {})),
                answer_tokens=call.answer_tokens,
                prompt=pack(ids),
                answer=pack(call.stand_in),
                **facts,
            )
            for session in sessions(load)
            for call in session.calls
        ]
    )


LOAD = Load(members=("a", "b", "c"), sessions=4, turns=2, lengths=Lengths(context=200, role=24))
KEPT = replace(LOAD, role_place="kept")


def test_members_over_one_context_are_worth_a_trial() -> None:
    found = plan(log_of(KEPT, seconds=0.5))
    says = {saving.sharing: saving for saving in found.savings}
    assert says["icarus"].worth and says["prefillshare"].worth and says["icarus"].rows == 2.0
    assert says["icarus"].prefill > says["prefillshare"].prefill > 0.3
    assert "do not switch" not in found.verdict and "icarus" in found.verdict
    assert "prefill tokens" in says["icarus"].says and "2.0x the rows" in says["icarus"].says
    assert found.notes == ()


def test_answers_are_found_again_only_where_they_come_back_behind_what_asked_for_them() -> None:
    cached = {
        load.role_place: {counted.case: counted.cached for counted in plan(log_of(load)).counted}
        for load in (LOAD, KEPT)
    }
    assert cached["last"]["icarus"] == cached["last"]["prefillshare"]
    assert cached["kept"]["icarus"] > cached["kept"]["prefillshare"]


def test_one_member_and_members_without_a_common_word_are_told_not_to_switch() -> None:
    alone = plan(log_of(replace(LOAD, members=("a",))))
    assert alone.verdict.startswith("do not switch: there is one member")
    strange = [Logged(float(n), "ab"[n % 2], 64, prompt=pack([n] * 64)) for n in range(40)]
    found = plan(Log(strange))
    assert found.verdict.startswith("do not switch: no sharing saves")
    assert not any(saving.worth for saving in found.savings)


def test_roles_in_front_are_guessed_and_moving_them_is_counted() -> None:
    found = plan(log_of(replace(LOAD, role_place="first")))
    assert found.moved is not None and found.moved.guessed
    assert found.moved.roles == {"a": 24, "b": 24, "c": 24}
    before = {counted.case: counted for counted in found.counted}
    after = {counted.case: counted for counted in found.moved.counted}
    last = {counted.case: counted for counted in plan(log_of(LOAD)).counted}
    assert before["prefillshare"].cached_other == 0 < after["prefillshare"].cached_other
    assert after["prefillshare"].cached_other == last["prefillshare"].cached_other
    assert "with instructions last it is worth a trial" in found.verdict
    assert all(pair.early == pair.met and pair.common == 0 for pair in found.pairs)


def test_roles_that_stand_last_are_not_guessed() -> None:
    assert guessed_roles(log_of(LOAD)) == {}
    assert plan(log_of(LOAD)).moved is None


def test_roles_that_are_told_are_not_guessed() -> None:
    log = log_of(replace(LOAD, role_place="first"), role=24 * 4)
    found = moved(log, cases(log.members))
    assert found is not None and not found.guessed and found.roles["a"] == 24


def test_where_two_members_part() -> None:
    log = Log(
        [
            Logged(0.0, "a", 40, prompt=pack([1] * 40)),
            Logged(1.0, "b", 40, prompt=pack([1] * 30 + [2] * 10)),
            Logged(2.0, "a", 40, prompt=pack([1] * 10 + [3] * 30)),
        ]
    )
    one, other = pairs(log)
    assert (one.member, one.other, one.common, one.early) == ("b", "a", 30, 0)
    assert (other.member, other.other, other.common, other.early) == ("a", "b", 10, 1)


def test_busy_times() -> None:
    """A request of two seconds every second, of two members in turns; the last ones end later."""
    log = Log([Logged(float(n), "ab"[n % 2], 8, 2, seconds=2.0) for n in range(25)])
    found = plan(log)
    assert len(found.windows) == WINDOWS and not found.counted
    assert found.windows[0].in_flight == 1.0 and found.windows[-1].in_flight == 2.0
    assert found.windows[0].members_busy == 1.0 and found.windows[-1].members_busy == 2.0
    assert found.windows[0].rate == 1.0 and found.windows[0].top_share == 1.0
    assert found.verdict.startswith("not told")
    assert found.balance["prompt_per_answer"] == 4.0


def test_notes_say_what_the_log_does_not_hold() -> None:
    text = Log([Logged(float(n), "ab"[n % 2], 8, 2, prompt=b"hello" * 6, kind="text") for n in range(4)])
    notes = " ".join(plan(text).notes)
    assert "four bytes" in notes and "answers are not in the log" in notes and "in flight" in notes
    served = Log([Logged(float(n), "ab"[n % 2], 8, 2, cached_tokens=4) for n in range(4)], source="server")
    found = plan(served)
    assert "holds no prompts" in found.notes[0] and "50.0% of the prompts" in sentence(found)


def test_every_table_has_as_many_cells_as_heads() -> None:
    for log in (log_of(LOAD), log_of(replace(LOAD, role_place="first"), seconds=1.0)):
        for _, heads, rows in tables(plan(log)):
            assert rows and all(len(row) == len(heads) for row in rows)


def test_a_log_of_one_moment() -> None:
    found = plan(Log([Logged(5.0, "a", 8), Logged(5.0, "b", 8)]))
    assert found.windows == () and found.seconds == 0 and found.balance["answer_tokens"] == 0
    assert "prompt_per_answer" not in found.balance, "JSON has no infinity"
