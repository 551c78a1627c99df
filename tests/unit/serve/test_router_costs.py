"""Lines fitted to measurements: exact where they lie on one, recent ones first, never negative."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.serve.router_costs import ENOUGH, Line, measured

seconds = st.floats(0, 100)


@given(
    fixed=st.floats(0, 1), each=st.floats(0, 0.1), units=st.sets(st.integers(1, 4096), min_size=2, max_size=9)
)
def test_points_on_a_line_give_the_line(fixed: float, each: float, units: set[int]) -> None:
    line = Line()
    for unit in units:
        line.learn(unit, fixed + each * unit)
    for unit in (0, 7, 5000):
        assert line.at(unit) == pytest.approx(fixed + each * unit, rel=1e-3, abs=1e-3)


@given(st.lists(st.tuples(st.floats(0, 1e6), seconds), min_size=1, max_size=30), st.floats(0, 1e6))
def test_nothing_ever_takes_less_than_no_time(points: list[tuple[float, float]], units: float) -> None:
    line = Line()
    for point in points:
        line.learn(*point)
    assert line.at(units) >= -1e-6


def test_what_is_measured_now_counts_more_than_what_was() -> None:
    line = Line()
    for _ in range(200):
        line.learn(100, 1.0)
    for _ in range(60):
        line.learn(100, 3.0)
    assert line.at(100) == pytest.approx(3.0, abs=0.1)


def test_an_own_line_that_nobody_asked_for_gives_way_to_everybodys() -> None:
    own, all_ = Line(), Line()
    assert measured(own, all_, 10) is None
    all_.learn(10, 1.0)
    assert measured(own, all_, 10) == 1.0
    own.learn(10, 50.0)
    assert measured(own, all_, 10) == 50.0
    while own.weight >= ENOUGH:
        own.forget()
    assert measured(own, all_, 10) == 1.0, "a bad first measurement is no verdict for ever"
