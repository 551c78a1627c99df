"""The stories in which everything goes wrong: a few hundred requests here, ten thousand by the command."""

import secrets
from dataclasses import replace
from pathlib import Path

import pytest

from heliostat.bench.ordeal import Cast, Outcome, cast, judge, near, orders_of, play, references
from heliostat.bench.reliability import PLOTS, page, sound


@pytest.fixture(scope="module")
def actors() -> Cast:
    return cast()


@pytest.mark.parametrize("what", PLOTS)
def test_each_story_in_short(what: str, actors: Cast) -> None:
    plot = replace(PLOTS[what], requests=40, seed=11)
    outcome = play(actors, plot, name=f"heliostat-test-{secrets.token_hex(4)}")
    assert sound(outcome), outcome
    assert outcome.right + outcome.left + outcome.ties + sum(outcome.failed.values()) == 40
    assert bool(outcome.faults) == bool(plot.frames.faults or plot.pages.faults)
    if what == "nothing goes wrong":
        assert outcome.right == 40 and not outcome.retried
    assert not list(Path("/dev/shm").glob("heliostat-test-*-prefill-*"))


def test_a_seed_tells_one_story(actors: Cast) -> None:
    plot = replace(PLOTS["all at once"], requests=30, seed=5)
    names = (f"heliostat-test-{secrets.token_hex(4)}" for _ in range(2))
    assert play(actors, plot, name=next(names)) == play(actors, plot, name=next(names))


def test_a_wrong_token_is_seen_and_a_tie_is_none(actors: Cast) -> None:
    outcome = Outcome()
    judge(outcome, (1, 2), (1, 2), lambda place: ())
    judge(outcome, (1, 3), (1, 2), lambda place: {0: (), 1: (2, 3)}[place])
    judge(outcome, (1, 3), (1, 2), lambda place: (2,))
    judge(outcome, (1,), (1, 2), lambda place: ())
    assert (outcome.right, outcome.ties, outcome.wrong) == (1, 1, 2)
    assert not sound(outcome)
    orders = orders_of(actors, replace(PLOTS["frames"], requests=20))
    wanted = references(actors, orders)
    assert {len(wanted[o.id]) for o in orders} == {o.sampling.max_tokens for o in orders}
    assert {o.member for o in orders} > {"sun.a"}
    firm = [near(actors, order, 0) == {wanted[order.id][0]} for order in orders]
    assert sum(firm) > 15, "hardly ever does the order of sums decide"


def test_the_page_counts_every_request() -> None:
    outcome = Outcome(right=5, ties=1, left=2, hung=1)
    outcome.failed["worker_lost"] += 2
    birth = {"command": "x", "hardware": "y", "threads": 1, "commit": "z", "date": "d"}
    told = page({"deaths": outcome.facts(), "frames": outcome.facts()}, birth)
    assert "| deaths | 11 | 0 | 0 | 0 | 6 | 2 | 2 | 0 | 1 | 0 |" in told
    assert "| **together** | 22 |" in told and "worker_lost (4)" in told
