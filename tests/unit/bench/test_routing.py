"""The routing benchmark decides what it says it decides."""

import pytest

from heliostat.bench.routing import MIXES, PARTS, Mix, _page, measure, told


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.name)
def test_each_mix_is_routed_and_timed(mix: Mix) -> None:
    times = measure(mix, decisions=5)
    assert len(times.keys) == len(times.choice) == len(times.books) == len(times.all) == 5
    rows = told(times)
    assert all(0 < rows[part]["median"] <= rows[part]["p99"] for part in PARTS)
    page = _page(
        {mix.name: rows}, {"command": "c", "hardware": "h", "decisions": 5, "commit": "x", "date": "d"}
    )
    assert f"| {mix.name} |" in page
