"""What is said of a run: goodput of all that was due, percentiles or the reason why not, the client's own faults."""

from typing import Any

import pytest

from heliostat.bench.measured import ceilings, steps, summary, where
from heliostat.bench.measured_page import _phases
from heliostat.bench.records import Limits, Record, Run
from heliostat.bench.workloads import Lengths, Load, sessions


def record(number: int = 0, *, outcome: str = "answered", **facts: Any) -> Record:
    """Due at its number; the first text after a second, ten more tokens a tenth each."""
    due = float(number)
    times: dict[str, Any] = {"sent": due, "first": due + 1.0, "last": due + 2.0, "end": due + 2.0}
    given = {
        "prompt_tokens": 100,
        "cached_tokens": 64,
        "answer_tokens": 11,
        "chunks": 11,
        "moments": 11,
        **times,
        **facts,
    }
    return Record(
        run=0,
        session=number,
        call=0,
        member="ab"[number % 2],
        task="t",
        time=due,
        scheduled=due,
        outcome=outcome,
        asked_tokens=11,
        **given,
    )


def ran(records: list[Record], **facts: Any) -> Run:
    run = Run(0, 1.0, records, **facts)
    run.spans |= {r.session: (r.scheduled, r.end) for r in records if r.outcome != "unfinished"}
    run.conversations |= {r.session: r.session for r in records}
    return run


LIMITS = Limits(ttft=1.5, tpot=0.15)


def test_goodput_is_of_all_that_was_due() -> None:
    slow = record(1, first=3.0, last=4.0)
    failed = [record(2, outcome="timeout"), record(3, outcome="skipped", sent=None, first=None, last=None)]
    found = summary(ran([record(0), slow, *failed, record(4, outcome="unfinished")]), LIMITS)
    assert found["goodput"]["share"]["value"] == 0.25
    asked = found["requests"]
    assert (asked["due"], asked["sent"], asked["answered"], asked["met"], asked["unfinished"]) == (
        4,
        3,
        2,
        1,
        1,
    )
    assert asked["outcomes"] == {"answered": 2, "skipped": 1, "timeout": 1}


def test_rates_hits_and_members() -> None:
    found = summary(ran([record(n) for n in range(9)]), LIMITS)
    assert found["seconds"] == 10.0
    assert found["throughput"]["requests"] == 0.9 and found["throughput"]["answer_tokens"] == 9.9
    assert found["hits"]["ratio"]["value"] == 0.64 and found["hits"]["told"] == 9
    assert found["by_member"]["a"] == {
        "due": 5,
        "answered": 5,
        "prompt_tokens": 500,
        "cached_tokens": 320,
        "answer_tokens": 55,
    }
    assert found["ttft"]["p50"]["value"] == 1.0 and found["tpot"]["p50"]["value"] == pytest.approx(0.1)
    assert found["latency"]["p95"] == {"why_not": "too few: 9 sessions of 200"}
    assert found["where"]["to the first text"] == 1.0 and sum(found["where"].values()) == 2.0


def test_a_server_that_tells_nothing() -> None:
    silent: dict[str, Any] = {
        "prompt_tokens": None,
        "cached_tokens": None,
        "answer_tokens": None,
        "chunks": 6,
        "moments": 6,
    }
    found = summary(ran([record(n, **silent) for n in range(3)]), LIMITS)
    assert found["hits"]["ratio"] == {"why_not": "nothing was counted"}
    assert found["requests"]["without_usage"] == 3 and found["requests"]["short"] == 3
    assert found["tpot"]["p50"]["value"] == pytest.approx(0.2)


def test_tokens_that_came_in_one_piece_are_told() -> None:
    found = summary(ran([record(0, moments=2), record(1, moments=6)]), LIMITS)
    assert found["requests"]["bundled"] == 1


def test_a_queue_that_grows_has_no_95th_percentile() -> None:
    records = [record(n, end=n + 2.0 + 0.5 * n, last=n + 2.0) for n in range(400)]
    found = summary(ran(records), LIMITS)
    assert found["queue"]["grows"] and found["ttft"]["p95"] == {"why_not": "the queue grows"}
    steady = summary(ran([record(n) for n in range(400)]), LIMITS)
    assert not steady["queue"]["grows"] and steady["ttft"]["p95"]["value"] == 1.0
    assert steady["ttft"]["p99"]["why_not"] == "too few: 400 sessions of 1000"


def test_a_slow_client_does_not_pass_for_a_slow_server() -> None:
    run = ran([record(n, sent=n + 0.3) for n in range(9)])
    assert summary(run, LIMITS)["client"]["slow"] and "client itself" in summary(run, LIMITS)["client"]["why"]
    fine = ran([record(n, sent=n + 0.01) for n in range(9)])
    assert not summary(fine, LIMITS)["client"]["slow"]
    fine.lateness.late = [0.2] * 50
    assert summary(fine, LIMITS)["client"]["slow"], "its loop was late although no request was"
    waited = ran([record(n, sent=n + 0.9, too_many=2) for n in range(9)])
    assert not summary(waited, LIMITS)["client"]["slow"], "the server refused for now"


def test_sessions_of_one_conversation_are_one_sample() -> None:
    run = ran([record(n) for n in range(8)])
    run.conversations = {n: n // 4 for n in range(8)}
    assert summary(run, LIMITS)["ttft"]["p95"]["why_not"] == "too few: 2 sessions of 200"


def test_nothing_was_due() -> None:
    assert summary(Run(3, None), LIMITS) == {"run": 3, "rate": None, "requests": {"due": 0}, "stopped": False}
    assert where([]) == {} and steps([]) == []


def test_a_distribution_ends_at_its_largest_value() -> None:
    assert steps([3.0, 1.0, 2.0]) == [[1.0, 1 / 3], [2.0, 2 / 3], [3.0, 1.0]]
    assert len(steps([float(n) for n in range(5000)])) == 100


def test_most_there_is_to_hit() -> None:
    lengths = Lengths(context=64, role=16, answer=16, observation=16, spread=0)
    load = Load(members=("a", "b", "c"), sessions=3, turns=1, lengths=lengths)
    found = ceilings(sessions(load), load.members)
    assert found["independent"]["hit_ratio"] == 0.0
    assert found["prefillshare"]["hit_ratio"] == pytest.approx((64 + 80) / (80 + 96 + 128))
    pools = found["icarus"]["pools"]
    assert pools["roomy"] == 4 * pools["even"] == 8 * pools["tight"] == 4 * found["icarus"]["session_tokens"]


def test_phases_are_those_of_the_server_and_the_rest_is_the_clients() -> None:
    told = {"queue": 0.25, "prefill": 0.5, "transfer": 0.25, "decode": 0.75}
    found = summary(ran([record(0, phases=told), record(1, phases=told), record(2)]), LIMITS)["phases"]
    assert found["told"] == 2
    assert found["mean"] == found["p50"] == {**told, "the rest": 0.25}
    assert summary(ran([record(0)]), LIMITS)["phases"] == {"told": 0}


def test_the_page_tells_phases_apart_where_the_server_does() -> None:
    told = {"queue": 0.25, "prefill": 0.5, "transfer": 0.25, "decode": 0.75}
    known = [{**summary(ran([record(n, phases=p) for n in range(3)]), LIMITS)} for p in (told, None)]
    assert "as the server tells" in "".join(_phases(known)) and "250 ms" in "".join(_phases(known))
    assert "this one does not" in "".join(_phases(known[1:]))
