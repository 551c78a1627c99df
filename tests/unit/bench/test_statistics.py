"""Percentiles only from enough, intervals that hold the truth as often as they say, and a queue that is seen to grow."""

import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.bench.statistics import bootstrap, interval, paired_ratio, percentile, queue, ratio

values = st.lists(st.floats(0, 1e6), min_size=1, max_size=60)


@given(values, st.sampled_from([50]))
def test_a_percentile_is_the_nearest_rank(found: list[float], q: int) -> None:
    estimate = percentile([(n, value) for n, value in enumerate(found)], q)
    assert estimate.value == sorted(found)[-(-len(found) * q // 100) - 1]
    if len(found) > 1:
        assert estimate.low is not None and estimate.high is not None
        assert min(found) <= estimate.low <= estimate.high <= max(found)


@pytest.mark.parametrize(("q", "least"), [(95, 200), (99, 1000)])
def test_a_percentile_wants_enough_sessions_not_enough_calls(q: int, least: int) -> None:
    few = [(n % (least - 1), float(n)) for n in range(4 * least)]
    assert percentile(few, q).why_not == f"too few: {least - 1} sessions of {least}"
    enough = percentile([(n, float(n)) for n in range(least)], q)
    assert enough.value == least * q / 100 - 1
    assert percentile([(n, float(n)) for n in range(least)], q, grows=True).why_not == "the queue grows"
    assert percentile([(0, 1.0), (1, 2.0)], 50, grows=True).value == 1.0


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    dice, held = random.Random(5), 0
    for trial in range(60):
        # Calls of a session are alike: an interval over calls would be much too narrow.
        sessions = [dice.gauss(10, 2) for _ in range(40)]
        parts = [(n, mean + dice.gauss(0, 0.1), 1.0) for n, mean in enumerate(sessions) for _ in range(8)]
        found = ratio(parts, seed=trial)
        assert found.low is not None and found.high is not None
        held += found.low <= 10 <= found.high
    assert 51 <= held <= 60


def test_a_ratio_is_of_sums() -> None:
    assert ratio([(0, 1, 4), (1, 3, 4), (1, 0, 8)]).value == 0.25
    assert ratio([]).why_not and ratio([(0, 0.0, 0.0)]).value is None
    assert ratio([(0, 1, 2)]).low is None, "one session has no interval"


def test_runs_in_turns_are_compared_pair_by_pair() -> None:
    drift = [1.0, 1.3, 1.7, 2.2, 2.9]
    found = paired_ratio([2 * speed for speed in drift], drift)
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)
    assert "too few" in paired_ratio([1.0], [1.0]).why_not
    with pytest.raises(ValueError, match="paired"):
        paired_ratio([1.0], [1.0, 2.0])


def test_the_middle_of_what_was_drawn() -> None:
    assert interval([float(n) for n in range(1001)]) == (25.0, 975.0)
    assert bootstrap([1.0], fmean) == []
    assert interval(bootstrap([1.0, 1.0], fmean)) == (1.0, 1.0)


def served(load: float, *, seed: int, count: int = 600) -> list[tuple[float, float]]:
    """(arrival, end) at one server that takes a second each, first come first served."""
    dice, now, free, spans = random.Random(seed), 0.0, 0.0, []
    for _ in range(count):
        now += dice.expovariate(load)
        free = max(free, now) + 1.0
        spans.append((now, free))
    return spans


def test_a_queue_past_saturation_grows_and_one_at_half_load_does_not() -> None:
    assert all(queue(served(1.3, seed=seed)).grows for seed in range(20))
    assert sum(queue(served(0.5, seed=seed)).grows for seed in range(40)) <= 2
    found = queue(served(1.3, seed=0))
    assert found.means[-1] > found.means[0] and "sessions in flight" in found.why


def test_too_few_sessions_are_no_queue() -> None:
    assert queue([(0.0, 1.0)] * 19).why == "too few sessions to tell"
    assert queue([(0.0, 1.0)] * 30).means == ()
    assert queue([(float(n), n + 1.5) for n in range(50)]).means == pytest.approx([1.5] * 10, abs=0.02)
