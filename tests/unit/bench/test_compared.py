"""What is said of points: caps that are chosen, ceilings and ratios counted by hand. No torch, no clock."""

from dataclasses import replace
from typing import Any

import pytest

from heliostat.bench.compared import able_caps, best_cap, best_pilot, ceiling, key, latency_ratio, paper, peak
from heliostat.bench.comparison import LOAD, Comparison
from heliostat.bench.counting import Counted
from heliostat.bench.systems import SYSTEMS, member_names

IT = Comparison(
    systems=(SYSTEMS["independent"], SYSTEMS["icarus"]),
    load=replace(LOAD, members=member_names(8)),
    rounds=3,
    caps=(2, 4, 8),
)


def said(share: float, median: float) -> dict[str, Any]:
    return {
        "summary": {"goodput": {"share": {"value": share}}, "session": {"p50": {"value": median}}},
    }


def test_names_of_points_are_names_of_files() -> None:
    assert key(IT, "peak", "popularity zipf:1.2", "icarus", 0) == "n8-peak-popularity-zipf-1.2-icarus-0"
    assert key(IT, "peak", "", "icarus", 0) == "n8-peak-icarus-0"


def test_the_cap_with_most_sessions_a_second_is_chosen() -> None:
    found = {
        key(IT, "tried", "icarus", cap): {"sessions_a_second": rate}
        for cap, rate in {2: 1.0, 4: 3.0, 8: 2.0}.items()
    }
    assert best_cap(IT, found, "icarus") == 4


def test_at_a_load_the_cap_is_chosen_by_goodput_then_by_quick_sessions() -> None:
    found = {
        key(IT, "pilot", 0.8, cap): point
        for cap, point in {2: said(0.9, 5.0), 4: said(0.9, 3.0), 8: said(0.5, 1.0)}.items()
    }
    assert best_pilot(IT, found, 0.8) == 4
    assert best_pilot(IT, {**found, key(IT, "pilot", 0.8, 4): {}}, 0.8) == 2, "4 was not tried"


def test_caps_that_cannot_carry_a_load_are_not_tried_at_it() -> None:
    found = {
        key(IT, "tried", "independent", cap): {"sessions_a_second": rate}
        for cap, rate in {2: 1.0, 4: 3.0, 8: 2.0}.items()
    }
    assert able_caps(IT, found, 0.5) == [2, 4, 8]
    assert able_caps(IT, found, 1.5) == [4, 8]
    assert able_caps(IT, found, 3.1) == [4], "none can: the best of all"


def test_the_peak_is_the_median_of_the_baselines_rounds() -> None:
    found = {
        key(IT, "peak", "", "independent", n): {"sessions_a_second": rate}
        for n, rate in enumerate((9.0, 1.0, 4.0))
    }
    assert peak(IT, found) == 4.0


def test_a_ceiling_takes_off_prompt_tokens_and_nothing_else() -> None:
    theirs = [
        {
            "sheet": {"prefill_rows": 800},
            "shares": {"prefill": 6.0, "decode": 3.0, "client": 1.0, "idle": 9.0},
        }
    ]
    found = ceiling(theirs, Counted("icarus", prompt=1000, cached_other=800), 4)
    assert found["prefill"] == 4.0
    assert found["throughput"] == pytest.approx(10 / (6 / 4 + 3 + 1))
    assert found["prefill_tokens_a_session"] == 50


def point(seconds: list[float], *, why_not: str = "") -> dict[str, Any]:
    told = {"why_not": why_not} if why_not else {"value": 1.0}
    return {
        "summary": {"queue": {"grows": bool(why_not)}, "session": {"p50": {"value": 1.0}, "p95": told}},
        "spans": {str(n): (n * 10.0, n * 10.0 + each) for n, each in enumerate(seconds)},
    }


def test_latencies_are_compared_over_the_same_sessions() -> None:
    slow, quick = point([4.0, 4.0, 8.0] * 80), point([2.0, 2.0, 2.0] * 80)
    ratio = latency_ratio(slow, quick, 95)
    assert ratio.value == 4.0 and ratio.low is not None and ratio.low <= 4.0


def test_there_is_no_ratio_where_either_has_no_percentile() -> None:
    grown = point([4.0] * 240, why_not="the queue grows")
    assert latency_ratio(grown, point([2.0] * 240), 95).why_not == "the queue grows"
    assert latency_ratio(point([2.0] * 240), grown, 95).why_not == "the queue grows"
    assert latency_ratio(point([2.0] * 240), grown, 50).why_not == "the queue grows"


def test_papers_are_named_only_in_their_own_setting() -> None:
    said = paper("icarus", {"workflow": "react"}, 8)
    assert said is not None and (said.throughput, said.p95) == ("3.8x", "11.1x")
    assert paper("icarus", {"workflow": "react"}, 5) is None
    assert paper("sun", {"workflow": "react"}, 4) is None
