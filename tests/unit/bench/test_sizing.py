"""Sizes: formulas beside the simulation, no worker too many, limits that nobody can keep, and scaling in a burst."""

from dataclasses import replace

import pytest

from heliostat.bench.autoscaling import Scaler, velocity_of
from heliostat.bench.costs import PARTS, Fitted
from heliostat.bench.counting import Case, cases
from heliostat.bench.layout import Machine, pools_of, sized, stations
from heliostat.bench.reckoning import Demand, fewest, reckon, step_seconds
from heliostat.bench.records import Limits
from heliostat.bench.simulator import Service
from heliostat.bench.sizing import Sizing, demand_of
from heliostat.bench.workloads import Call, Part, Session
from heliostat.errors import Refused
from heliostat.serve.scaling import Scaling

CURVE = {1: 0.010, 2: 0.0105, 4: 0.0115, 8: 0.0135, 16: 0.0175, 32: 0.0255, 64: 0.0415}
COSTS = Fitted(
    dict.fromkeys(PARTS, 0.0)
    | {"step": 0.001}
    | {f"pass of {n}": CURVE.get(n, 0.0005 * n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)},
    byte_seconds=1e-10,
)
MACHINE = Machine(name="steady", costs=COSTS, page_bytes=65_536, pages=4000)
LIMITS = Limits(ttft=1.0, tpot=0.03)


def case(name: str, members: str = "ab") -> Case:
    return next(found for found in cases(members) if found.name == name)


def open_loop(
    rate: float, seconds: float, *, members: str = "ab", start: float = 0.0, seed: int = 0
) -> list[Session]:
    """Requests of 200 prompt tokens and 40 answer tokens at the times of a Poisson process, nothing in common."""
    import random

    made: list[Session] = []
    dice, now = random.Random(seed), start
    while (now := now + dice.expovariate(rate)) < start + seconds:
        number = int(1e6 * start) + len(made)
        call = Call(
            number=0,
            member=dice.choice(members),
            task="t",
            prompt=(Part("user", tuple(dice.choices(range(10**6), k=200))),),
            answer_tokens=40,
            stand_in=tuple(range(40)),
        )
        made.append(Session(number, now, (call,)))
    return made


@pytest.mark.parametrize("sharing", ["independent", "sun"])
@pytest.mark.parametrize("rate", [4.0, 8.0])
def test_formulas_are_near_what_is_simulated(sharing: str, rate: float) -> None:
    asked, named = open_loop(rate, 50), case(sharing)
    pools = pools_of(named, split=True, apart=False)
    counts = {"prefill": 2, "decode": 1}
    service = Service(stations(MACHINE, named, sized(pools, counts)), named.rows)
    run = service.run(asked)
    demand = demand_of(named, asked)
    found = {pool.name: reckon(MACHINE, named, pool, demand, counts[pool.name]) for pool in pools}
    tpots = sorted(record.tpot or 0.0 for record in run.records)
    assert found["decode"].tpot == pytest.approx(tpots[len(tpots) // 2], rel=0.25)
    busy = sum(s.tally.busy for n, s in service.stations.items() if n.startswith("prefill")) / 2 / service.now
    assert found["prefill"].busy == pytest.approx(busy, rel=0.2)
    ttfts = sorted(record.ttft or 0.0 for record in run.records)
    reckoned = (found["prefill"].wait or 0.0) + (found["prefill"].run or 0.0)
    assert reckoned == pytest.approx(ttfts[int(0.95 * len(ttfts))], rel=0.5)


def test_formulas_and_simulation_want_about_as_many_workers() -> None:
    asked = open_loop(30.0, 12)
    sizing = Sizing(MACHINE, case("sun"), asked, LIMITS)
    simulated, reckoned = sizing.find(split=True, apart=False), sizing.reckoned(split=True, apart=False)
    assert simulated.how == "simulated" and (simulated.goodput or 0.0) >= 0.9
    assert abs(simulated.prefill - reckoned.prefill) <= 2 and abs(simulated.decode - reckoned.decode) <= 2
    # Not one too many: with one less of either the limits are not kept.
    pools = pools_of(sizing.case, split=True, apart=False)
    for name in simulated.counts:
        less = dict(simulated.counts) | {name: simulated.counts[name] - 1}
        assert less[name] == 0 or not sizing.keeps(pools, less)


def test_one_batch_over_all_members_needs_fewer_than_one_each() -> None:
    asked = open_loop(4.0, 30, members="abcd")
    apart, shared = (
        Sizing(MACHINE, case(name, "abcd"), asked, LIMITS).find(split=True, apart=True)
        for name in ("independent", "sun")
    )
    assert apart.decode == 4 > shared.decode


def test_limits_that_an_idle_service_misses_are_met_by_no_number() -> None:
    sizing = Sizing(MACHINE, case("sun"), open_loop(2.0, 10), Limits(ttft=1.0, tpot=0.005))
    found = sizing.find(split=True, apart=False)
    assert (
        not found.counts and found.workers == 0 and "no number of workers keeps the limits" in found.why_not
    )
    assert "by formulas" in sizing.reckoned(split=True, apart=False).why_not


def test_a_decode_step_of_members_with_weights_of_their_own_has_a_pass_for_each_that_is_there() -> None:
    shares = dict.fromkeys("abcd", 0.25)
    apart = step_seconds(case("independent", "abcd"), COSTS, shares, 1, 100)
    assert apart == pytest.approx(step_seconds(case("sun", "abcd"), COSTS, shares, 1, 100))
    many = step_seconds(case("independent", "abcd"), COSTS, shares, 40, 100)
    assert many == pytest.approx(0.001 + 4 * COSTS.coefficients["pass of 8"] * 1.07, rel=0.05)


def test_fewest_is_none_where_it_is_never_enough() -> None:
    pool = pools_of(case("sun"), split=True, apart=False)[1]
    demand = dict.fromkeys("ab", Demand(rate=1.0, prompt=200, fresh=200, answer=40))
    assert fewest(MACHINE, case("sun"), pool, demand, Limits(ttft=1, tpot=0.001), most=1000) is None
    assert fewest(MACHINE, case("sun"), pool, demand, LIMITS, most=1000) == 1


def test_scaling_keeps_more_requests_than_a_fixed_pool_of_as_many_worker_seconds() -> None:
    calm, burst = open_loop(3.0, 60, seed=1), open_loop(25.0, 25, start=20.0, seed=2)
    asked = sorted([*calm, *burst], key=lambda session: session.start)
    named = case("sun")
    pools = pools_of(named, split=True, apart=False)
    velocity = velocity_of(MACHINE, named, Demand(rate=1, prompt=200, fresh=200, answer=40), LIMITS)
    scaler = Scaler(Scaling(velocity), MACHINE, named, (pools[0], pools[1]), start_seconds=2.0)

    def good(counts: dict[str, int], watcher: Scaler | None = None) -> tuple[float, float]:
        service = Service(stations(MACHINE, named, sized(pools, counts)), named.rows, watcher=watcher)
        run = service.run(asked)
        assert all(record.answered for record in run.records)
        return sum(record.meets(LIMITS) for record in run.records) / len(
            run.records
        ), service.paid() / service.now

    scaled, paid = good({"prefill": 1, "decode": 1}, scaler)
    fixed = {number: good({"prefill": number, "decode": number}) for number in (1, 2, 3, 4)}
    # The least that keeps as many is paid for longer; what costs as much keeps fewer.
    as_good = min(workers for share, workers in fixed.values() if share >= scaled)
    as_cheap = max(share for share, workers in fixed.values() if workers <= paid)
    assert paid < as_good and scaled > as_cheap
    assert scaler.most > 2


def test_a_velocity_that_no_worker_has_is_refused() -> None:
    with pytest.raises(Refused, match="one request alone takes longer"):
        velocity_of(
            MACHINE,
            case("sun"),
            Demand(rate=1, prompt=200, fresh=200, answer=40),
            replace(LIMITS, tpot=0.001),
        )
