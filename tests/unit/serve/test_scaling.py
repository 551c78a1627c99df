"""Scaling: workers follow tokens a second, up at once and down slowly; numbers that mean nothing are refused."""

import pytest

from heliostat.errors import Refused
from heliostat.serve.scaling import DOWN_SECONDS, Scaling, Velocity

FAST = Velocity(prefill=1000.0, decode=100.0)


def test_nothing_that_came_wants_the_least() -> None:
    scaling = Scaling(FAST, least=2)
    assert scaling.wanted(0.0) == {"prefill": 2, "decode": 2}


def test_workers_are_tokens_a_second_over_what_one_gets_through() -> None:
    scaling = Scaling(FAST, headroom=1.0)
    for second in range(11):
        scaling.note(float(second), prompt=3500.0 * second, answer=250.0 * second)
    assert scaling.wanted(10.0) == {"prefill": 4, "decode": 3}
    half = Scaling(FAST, headroom=1.0, hits=0.5)
    half.note(0.0, prompt=0, answer=0)
    half.note(1.0, prompt=3500, answer=0)
    assert half.wanted(1.0)["prefill"] == 2


def test_the_slower_of_reading_and_moving_decides() -> None:
    scaling = Scaling(Velocity(prefill=1000.0, decode=100.0, network=500.0), headroom=1.0)
    scaling.note(0.0, prompt=0, answer=0)
    scaling.note(2.0, prompt=4000, answer=0)
    assert scaling.wanted(2.0)["prefill"] == 4


def test_what_is_found_need_not_run_but_travels() -> None:
    scaling = Scaling(Velocity(prefill=1000.0, decode=100.0, network=1000.0), headroom=1.0, hits=0.9)
    scaling.note(0.0, prompt=0, answer=0)
    scaling.note(2.0, prompt=8000, answer=0)
    assert scaling.wanted(2.0)["prefill"] == 4


def test_a_burst_shows_at_once_and_goes_slowly() -> None:
    scaling = Scaling(FAST, headroom=1.0)
    said, wanted = 0.0, []
    for second in range(120):
        scaling.note(float(second), prompt=0.0, answer=said)
        wanted.append(scaling.wanted(float(second))["decode"])
        said += 1000.0 if 40 <= second < 50 else 50.0
    assert wanted[39] == 1 and wanted[42] == 10
    assert wanted[55] > 1 and wanted[int(51 + DOWN_SECONDS) + 1] == 1
    assert max(wanted) == 10


def test_there_are_never_more_than_most() -> None:
    scaling = Scaling(FAST, most=5)
    scaling.note(0.0, prompt=0, answer=0)
    scaling.note(1.0, prompt=1e9, answer=1e9)
    assert scaling.wanted(1.0) == {"prefill": 5, "decode": 5}


@pytest.mark.parametrize("options", [{"least": 0}, {"least": 3, "most": 2}, {"headroom": 0.5}, {"hits": 1.0}])
def test_settings_that_mean_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(Refused, match="workers|headroom"):
        Scaling(FAST, **options)  # type: ignore[arg-type]
    with pytest.raises(Refused, match="velocities"):
        Velocity(prefill=0.0, decode=1.0)
