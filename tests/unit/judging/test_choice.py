"""Thresholds: at most the share of known unacceptable tokens passes tau, and theta does what its name says."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import Refused
from heliostat.judging.choice import area_under, chosen_theta, point_at, tau_of, thetas_of

SCORES = st.lists(st.floats(-9, 9), min_size=1, max_size=40)
LABELLED = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), st.booleans()), min_size=1, max_size=30
)


def test_tau_lies_so_that_better_tokens_are_acceptable() -> None:
    bad = [-9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.5]
    assert tau_of(bad, share=0.1) == -1.0  # one of ten, the best, passes
    assert tau_of(bad, share=0.0) == 0.5
    assert tau_of(bad, share=0.5) == -5.0
    assert tau_of(bad, share=1.0) == -math.inf


@given(scores=SCORES, share=st.floats(0, 1))
def test_no_more_than_the_share_passes_tau_and_a_lower_one_would_let_more(
    scores: list[float], share: float
) -> None:
    tau = tau_of(scores, share=share)
    passing = sum(score > tau for score in scores)
    assert passing <= share * len(scores) + 1e-6
    lower = max((score for score in scores if score < tau), default=-math.inf)
    if tau > -math.inf:
        assert sum(score > lower for score in scores) > share * len(scores) - 1e-6


@given(scores=SCORES, low=st.floats(0, 1), high=st.floats(0, 1))
def test_a_larger_share_never_raises_tau(scores: list[float], low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert tau_of(scores, share=high) <= tau_of(scores, share=low)


def test_without_known_tokens_there_is_no_tau() -> None:
    with pytest.raises(Refused, match="no token is known to be unacceptable"):
        tau_of([], share=0.1)


@given(LABELLED)
def test_f1_is_the_best_of_all_thresholds(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = [p[0] for p in pairs], [p[1] for p in pairs]
    theta = thetas_of(scores, labels, recall=0.9)["f1"]
    best = max(point_at(cut, scores, labels).f1 for cut in (0.0, *scores, math.inf))
    assert point_at(theta, scores, labels).f1 == pytest.approx(best)


@given(LABELLED, st.floats(0, 1))
def test_recall_rejects_as_many_unacceptable_ones_as_asked_and_accepts_all_it_can(
    pairs: list[tuple[float, bool]], recall: float
) -> None:
    scores, labels = [p[0] for p in pairs], [p[1] for p in pairs]
    theta = thetas_of(scores, labels, recall=recall)["recall"]
    point = point_at(theta, scores, labels)
    assert point.recall >= recall - 1e-6
    for cut in (cut for cut in scores if cut < theta):
        more = point_at(cut, scores, labels)
        assert more.recall < recall + 1e-6 or more.accepted == point.accepted


def test_a_theta_that_is_asked_for_by_another_name_is_refused() -> None:
    assert chosen_theta("f1", {"recall": 0.5, "f1": 0.25}) == 0.25
    with pytest.raises(Refused, match="way to choose theta"):
        chosen_theta("f2", {"recall": 0.5, "f1": 0.25})


@given(LABELLED)
def test_the_area_is_the_share_of_pairs_in_the_right_order(pairs: list[tuple[float, bool]]) -> None:
    scores, labels = [p[0] for p in pairs], [p[1] for p in pairs]
    good, bad = [s for s, y in pairs if y], [s for s, y in pairs if not y]
    found = area_under(scores, labels)
    if not good or not bad:
        assert math.isnan(found)
        return
    right = sum((g > b) + (g == b) / 2 for g in good for b in bad)
    assert found == pytest.approx(right / (len(good) * len(bad)))


def test_a_point_counts_what_it_says() -> None:
    point = point_at(0.5, [0.9, 0.8, 0.6, 0.4, 0.2], [True, False, True, True, False])
    assert (point.accepted, point.recall) == (0.6, 0.5)
    assert point.precision == pytest.approx(2 / 3)
    assert point.f1 == pytest.approx(2 / 3)
    nothing = point_at(math.inf, [0.9], [True])
    assert (nothing.accepted, nothing.precision, nothing.f1) == (0.0, 1.0, 0.0)
