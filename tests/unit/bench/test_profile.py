"""The profile of an engine, on a tiny plan: every part runs, and the page says what was found."""

import json
from pathlib import Path
from typing import Any

import pytest

from heliostat.bench import profile
from heliostat.bench.profile_page import page, picture


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """A shape of its own would be another thing: the smallest there is, one repetition."""
    return profile.measured("24M", profile.Plan(("24M",), (1, 8), (16,), 1))


def test_every_phase_is_there(found: dict[str, Any]) -> None:
    one, many = found["decode"]
    assert (one["batch"], many["batch"]) == (1, 8) and "icarus_loop" in many and "icarus_loop" not in one
    for row in (one, many):
        for name in ("base", "multilora", "icarus"):
            assert 0 <= row[f"{name}_blocks"] < row[name]
    (prefill,), (move,) = found["prefill"], found["move"]
    assert prefill["tokens"] == move["tokens"] == 16 and prefill["seconds"] > 0
    assert move["bytes"] == 16 * found["token_bytes"] and move["bring"] > 0 and move["lend"] > 0


def test_the_page_says_it(found: dict[str, Any], tmp_path: Path) -> None:
    birth = {"command": "c", "hardware": "h", "commit": "1", "date": "d", "python": "3", "repeats": 1}
    birth |= {"versions": {"torch": "2"}, "members": 8, "context": 230}
    row = {"base": 2.0, "base_blocks": 1.5, "multilora": 3.0, "icarus": 3.0, "multilora_loop": 6.0}
    decode = [{"batch": 8, **row, "icarus_loop": 30.0}]
    results = {
        "birth": birth,
        "bandwidth": 1e9,
        "products": 1e9,
        "shapes": {"24M": {**found, "decode": decode}},
    }
    text = page(json.loads(json.dumps(results)))
    assert (
        "3.00 (1.50x)" in text and "25%" in text and "(10.0 times)" in text and "(2.0 times as long)" in text
    )
    assert picture(results).startswith("<svg")


def test_the_blocks_are_put_back() -> None:
    class Model:
        at_once: Any = object()

    model: Any = Model()
    before = model.at_once
    with profile.watched(model) as timed, profile.looped(model):
        assert timed is not None and model.at_once is None
    assert model.at_once is before
