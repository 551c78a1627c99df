"""The simulator: a case by hand, nothing lost, the same every time, and the classes that serve."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from heliostat.bench.costs import PARTS, Fitted
from heliostat.bench.counting import Case, cases, count
from heliostat.bench.layout import Machine, pools_of, sized, station, stations
from heliostat.bench.measured import planned_log
from heliostat.bench.records import Run
from heliostat.bench.simulator import Service
from heliostat.bench.station import MAX_TOKENS_PER_STEP
from heliostat.bench.workloads import Call, Lengths, Load, Part, Session, sessions
from heliostat.engine import engine
from heliostat.engine.page_table import PageTable
from heliostat.engine.scheduler import Scheduler
from heliostat.errors import Refused
from heliostat.serve import router

FREE = dict.fromkeys(PARTS, 0.0)
COSTS = Fitted(FREE | {"step": 1.0, "pass of 1": 2.0, "pass of 8": 9.0, "pass of 16": 9.0}, byte_seconds=0.25)
HAND = Machine(name="by hand", costs=COSTS, page_bytes=2, pages=32, page_size=4)
LOAD = Load(
    members=("a", "b", "c"),
    sessions=12,
    turns=1,
    rate=0.02,
    pause=0.2,
    role_place="kept",
    lengths=Lengths(context=40, role=6, answer=6, observation=8),
)
STEADY = Machine(
    name="steady",
    costs=Fitted(
        FREE
        | {"step": 1e-3, "row": 1e-3}
        | {f"{kind} of {n}": 1e-3 * n for kind in ("pass", "adapted pass") for n in (1, 2, 4, 8, 16, 32, 64)},
        byte_seconds=1e-9,
        hop=1e-3,
    ),
    page_bytes=4096,
    pages=400,
)


def case(name: str, members: tuple[str, ...] = ("a", "b", "c")) -> Case:
    return next(found for found in cases(members) if found.name == name)


def calls(*asked: tuple[float, int, int]) -> list[Session]:
    """(when, tokens of the prompt, of the answer), all of member a, nothing in common."""
    return [
        Session(
            number,
            when,
            (
                Call(
                    number=0,
                    member="a",
                    task="t",
                    prompt=(Part("user", tuple(range(1000 * number, 1000 * number + prompt))),),
                    answer_tokens=answer,
                    stand_in=tuple(range(answer)),
                ),
            ),
        )
        for number, (when, prompt, answer) in enumerate(asked)
    ]


def simulate(
    named: Case,
    machine: Machine,
    asked: list[Session],
    *,
    split: bool = False,
    counts: Mapping[str, int] = {},
) -> tuple[Run, Service]:
    pools = pools_of(named, split=split, apart=False)
    pools = sized(pools, {pool.name: counts.get(pool.name, 1) for pool in pools})
    service = Service(stations(machine, named, pools), named.rows)
    return service.run(asked), service


def test_one_worker_by_hand() -> None:
    # 0 to 10: 8 prompt tokens (1 for the step, 9 for the pass). A token each 3 seconds, until 16. The second comes at 11,
    # waits for the step that ends at 13, and joins: both together are a step with 9 rows (1 + 9), until 23.
    run, service = simulate(case("independent", ("a",)), HAND, calls((0.0, 8, 3), (11.0, 8, 2)))
    first, second = run.records
    assert (first.first, first.last, first.tokens) == (10.0, 23.0, 3)
    assert (second.first, second.last) == (23.0, 26.0)
    assert first.ttft == 10.0 and first.tpot == 6.5 and second.ttft == 12.0
    assert service.now == 26.0 and service.stations["worker.0"].tally.busy == 26.0


def test_pages_that_change_workers_by_hand() -> None:
    # The writer says the first token at 10. Its two pages of 2 bytes take a second, the step that they come in ends at 12
    # (1 for the step); from then on a token each 3 seconds.
    run, service = simulate(case("sun", ("a",)), HAND, calls((0.0, 8, 3)), split=True)
    (record,) = run.records
    assert (record.first, record.last) == (10.0, 18.0)
    tallies = {name: station.tally for name, station in service.stations.items()}
    assert tallies["decode.0"].moved == 4 and tallies["prefill.0"].busy == 10.0
    assert all(station.idle for station in service.stations.values())


@pytest.mark.parametrize("sharing", ["independent", "sun", "prefillshare", "icarus"])
@pytest.mark.parametrize("split", [False, True])
def test_everything_is_answered_and_no_page_is_kept(sharing: str, split: bool) -> None:
    asked = sessions(replace(LOAD, rate=2.0))
    run, service = simulate(case(sharing), STEADY, asked, split=split, counts={"decode": 2})
    planned = {(s.number, c.number): c.answer_tokens for s in asked for c in s.calls}
    assert {(r.session, r.call): r.tokens for r in run.records} == planned
    assert all(record.answered for record in run.records)
    assert run.spans.keys() == {session.number for session in asked}
    for one in service.stations.values():
        assert one.idle and one.scheduler.table.available() == one.scheduler.table.pages
        assert not one.scheduler.unfinished and not one.scheduler.handed


def test_a_pool_too_small_for_all_answers_all_the_same() -> None:
    long = replace(LOAD, rate=50.0, lengths=replace(LOAD.lengths, answer=40))
    run, service = simulate(case("prefillshare"), replace(STEADY, pages=20), sessions(long), split=True)
    assert all(record.answered for record in run.records)
    # Who only decodes cannot write a prompt's pages again: what it loses is prefilled once more.
    assert sum(one.tally.preempted for one in service.stations.values()) > 0
    assert max(record.tries for record in run.records) > 1


def test_the_same_sessions_take_the_same_time_and_hits_are_those_that_are_counted() -> None:
    asked = sessions(LOAD)
    facts = [
        [
            (r.session, r.call, r.first, r.last, r.cached_tokens)
            for r in simulate(case("icarus"), STEADY, asked)[0].records
        ]
        for _ in range(2)
    ]
    assert facts[0] == facts[1]
    # Sessions that are far apart find every page that there is to find.
    cached = sum(fact[4] or 0 for fact in facts[0])
    assert cached == count(planned_log(asked), [case("icarus")], flying=False)[0].cached


def test_what_decides_is_what_serves() -> None:
    one = station(STEADY, case("sun"), pools_of(case("sun"), split=False, apart=False)[0], 0)
    assert type(one.scheduler) is Scheduler and type(one.scheduler.table) is PageTable
    assert type(Service([one], case("sun").rows).router) is router.Router
    assert MAX_TOKENS_PER_STEP == engine.MAX_TOKENS_PER_STEP


def test_a_request_that_is_too_long_fails_and_what_goes_on_from_it_is_skipped() -> None:
    short = replace(STEADY, max_length=50)
    run, _ = simulate(case("independent"), short, sessions(replace(LOAD, sessions=3)))
    outcomes = {record.outcome for record in run.records}
    assert outcomes == {"answered", "status 400", "skipped"} or outcomes == {"status 400", "skipped"}
    assert len(run.records) == 9


def test_a_member_that_nobody_hosts_is_told() -> None:
    hosts = replace(pools_of(case("independent"), split=False, apart=False)[0], modules=("a.own",))
    with pytest.raises(Refused, match="cannot answer 'b'|cannot answer 'c'"):
        Service([station(STEADY, case("independent"), hosts, 0)], case("independent").rows).run(
            sessions(LOAD)
        )


def test_workers_are_hired_and_let_go() -> None:
    named = case("sun")
    pools = pools_of(named, split=True, apart=False)

    class Change:
        every = 1.0

        def __init__(self) -> None:
            self.looks = 0

        def look(self, service: Service) -> None:
            self.looks += 1
            if self.looks == 1:
                service.hire(station(STEADY, named, pools[1], 7), after=0.5)
            if self.looks == 3:
                assert "decode.7" in service.stations and service.coming == 0
                service.let_go("decode.0")

    service = Service(stations(STEADY, named, pools), named.rows, watcher=Change())
    run = service.run(sessions(replace(LOAD, rate=1.0)))
    assert all(record.answered for record in run.records)
    assert [one.offer.worker for one in service.gone] == ["decode.0"]
    assert 0 < service.paid() < 3 * service.now and service.stations.keys() == {"prefill.0", "decode.7"}


def test_modules_that_do_not_fit_a_machine_are_refused() -> None:
    small = replace(STEADY, room=10 * 4096 * 70, weights_bytes=4096 * 70)
    named = case("independent")
    assert stations(small, named, pools_of(named, split=False, apart=True))[0].offer.pages == 9 * 70
    with pytest.raises(Refused, match="3 modules of .* do not fit"):
        stations(replace(small, room=4096 * 70 * 3), named, pools_of(named, split=False, apart=False))
