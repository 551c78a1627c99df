"""Workers and money for a log: by hand, do not switch, what cannot be told, and the busiest stretch."""

from dataclasses import replace

import pytest

from heliostat.bench.fleet import busiest, fleet, sessions_of
from heliostat.bench.logs import Log, Logged, pack
from heliostat.bench.machines import machine, model_named
from heliostat.bench.plan_page import tables
from heliostat.bench.planning import plan
from heliostat.bench.records import Limits
from heliostat.bench.workloads import prompt_ids
from heliostat.errors import Refused
from tests.unit.bench.test_sizing import LIMITS, MACHINE


def log_of(members: str, *, count: int = 60, every: float = 0.2, common: int = 0) -> Log:
    """Prompts of 200 tokens that begin alike, answers of 40; nothing else in common."""
    return Log(
        [
            Logged(
                time=100.0 + every * n,
                member=members[n % len(members)],
                prompt_tokens=200,
                answer_tokens=40,
                prompt=pack([*range(common), *range(10_000 * (n + 1), 10_000 * (n + 1) + 200 - common)]),
            )
            for n in range(count)
        ]
    )


def test_one_member_needs_as_many_workers_under_every_sharing_that_reads_and_speaks_once() -> None:
    found = fleet(log_of("a"), MACHINE, LIMITS, price=2.0)
    workers = {one.sized.sharing: one.sized.workers for one in found.priced}
    assert workers["independent"] == workers["prefillshare"] == 1
    assert found.verdict.startswith("do not switch: separate models need 1 worker,")
    apart = found.priced[0]
    # 40 answer tokens each 0.2 s, but for one interval less than there are requests.
    assert apart.per_hour == 2.0 and apart.per_million == pytest.approx(2.0 / 3600 / (60 * 40 / 11.8) * 1e6)


def test_members_that_share_their_decoding_need_fewer_workers() -> None:
    found = fleet(log_of("abcdefgh", count=80, every=0.1), MACHINE, LIMITS)
    workers = {one.sized.sharing: one.sized.workers for one in found.priced}
    assert workers["sun"] < workers["independent"]
    assert "worth a trial, as simulated" in found.verdict
    assert all(one.per_hour is None for one in found.priced)


def test_limits_that_nobody_can_keep_are_told() -> None:
    found = fleet(log_of("ab", count=20), MACHINE, Limits(ttft=1.0, tpot=0.001), price=1.0)
    assert all(not one.sized.counts and one.per_hour is None for one in found.priced)
    assert found.verdict.startswith(
        "no way of sharing keeps these limits on this machine: no number of workers"
    )
    table = tables(replace(plan(log_of("ab", count=20)), fleet=found))[-1]
    assert "Workers on steady" in table[0] and all("no number of workers" in row[-1] for row in table[2])


def test_members_that_do_not_fit_one_worker_get_workers_of_their_own() -> None:
    small = machine("rtx4090-24", model_named("8b"))
    found = fleet(log_of("ab", count=12, every=1.0), small, Limits(ttft=5.0, tpot=0.2), price=0.5)
    apart = found.priced[0].sized
    assert apart.apart and apart.workers == 2 and "do not fit" not in apart.why_not


@pytest.mark.parametrize("price", [-1.0, float("inf"), float("nan")])
def test_a_price_that_is_none_is_refused(price: float) -> None:
    with pytest.raises(Refused, match="price is"):
        fleet(log_of("a"), MACHINE, LIMITS, price=price)


def test_logs_without_lengths_or_times_are_refused() -> None:
    without = Log([replace(logged, answer_tokens=0) for logged in log_of("ab").requests])
    with pytest.raises(Refused, match="how long answers were"):
        fleet(without, MACHINE, LIMITS)
    at_once = Log([replace(logged, time=1.0) for logged in log_of("ab").requests])
    with pytest.raises(Refused, match="came at one time"):
        fleet(at_once, MACHINE, LIMITS)


def test_of_a_long_log_the_busiest_stretch_is_looked_at() -> None:
    calm, busy = log_of("a", count=50, every=5.0), log_of("a", count=20, every=0.1)
    later = [replace(logged, time=logged.time + 1000) for logged in busy.requests]
    told = busiest(Log([*calm.requests, *later]), 20)
    assert [logged.time for logged in told] == [logged.time for logged in later]
    assert len(busiest(calm, 100)) == 50


def test_a_log_becomes_sessions_that_begin_alike_where_its_prompts_do() -> None:
    one, two = sessions_of(log_of("ab", count=2, common=64).requests)
    ids = [prompt_ids(session.calls[0], {}) for session in (one, two)]
    assert ids[0][:64] == ids[1][:64] == list(range(64)) and ids[0][64] != ids[1][64]
    assert one.start == 0.0 and two.start == pytest.approx(0.2) and len(ids[0]) == 200
    unknown = [Logged(float(n), "a", 50, 7) for n in range(2)]
    made = [prompt_ids(session.calls[0], {}) for session in sessions_of(unknown)]
    assert [len(ids) for ids in made] == [50, 50] and made[0] != made[1]
    text = Logged(0.0, "a", 3, 2, prompt=b"hello wor", answer=b"ok", kind="text")
    call = sessions_of([text])[0].calls[0]
    assert len(prompt_ids(call, {})) == 3 and len(call.stand_in) == 2
