"""Ten thousand requests in whose way everything comes that can: none is wrong, none hangs, no page leaks."""

import pytest

from heliostat.bench.reliability import PLOTS, sound, tell

pytestmark = pytest.mark.slow


def test_ten_thousand_requests() -> None:
    assert sum(plot.requests for plot in PLOTS.values()) == 10_000
    found = tell(seed=1)
    assert all(map(sound, found.values())), found
    assert found["deaths"].deaths > 5 and sum(found["all at once"].faults.values()) > 500
