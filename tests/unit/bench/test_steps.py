"""Measured steps: a table of them, and the simulator's books beside a real engine's over the same sessions."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from heliostat.bench import decode
from heliostat.bench.costs import PARTS
from heliostat.bench.steps import moving, rows_of, table, toolbox
from heliostat.bench.validating import LOAD, TOLERANCE, case_of, measured, page, simulated, told, within
from heliostat.bench.workloads import sessions
from heliostat.build import Loaded
from heliostat.family import SHARINGS

TINY = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}


@pytest.fixture(scope="module")
def tiny() -> Iterator[dict[str, Loaded]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(decode.SHAPES, "tiny", TINY)
        yield toolbox("tiny", dtype=torch.float32)


def test_a_table_has_every_part_and_says_how_good_it_is(tiny: dict[str, Loaded]) -> None:
    costs, held = table("tiny", seconds=0.2, hop=0.001, command="test")
    assert costs.coefficients.keys() == set(PARTS) and held
    assert costs.seconds([]) >= 0 and costs.byte_seconds > 0 and costs.hop == 0.001
    assert costs.about["steps"]["held_out"] == len(held) and costs.about["error"]["median"] < 1
    assert costs.about["birth"]["command"] == "test" and costs.about["page_bytes"] == 2 * 2 * 16 * 32 * 2


def test_every_sharing_is_among_the_mixtures() -> None:
    assert SHARINGS.keys() < rows_of().keys()


def test_moving_a_byte_takes_some_time() -> None:
    assert 0 < moving(4096, 4, pages=8, repeats=3) < 1e-3


@pytest.mark.parametrize("sharing", ["sun", "icarus"])
def test_engine_and_simulator_answer_the_same_and_find_the_same(
    tiny: dict[str, Loaded], sharing: str
) -> None:
    costs, _ = table("tiny", seconds=0.05, hop=0.0, command="test")
    case = case_of(sharing, LOAD.members)
    # Far apart, so that nothing depends on how long a step takes.
    asked = sessions(replace(LOAD, sessions=4, rate=0.01, pause=0.0))
    books: list[list[tuple[Any, ...]]] = []
    for run in (measured(case, tiny, asked), simulated(case, costs, asked)):
        order = sorted(run.records, key=lambda r: (r.session, r.call))
        books.append(
            [(r.session, r.call, r.outcome, r.prompt_tokens, r.cached_tokens, r.tokens) for r in order]
        )
    assert books[0] == books[1] and all(book[2] == "answered" for book in books[0])
    # Each member reads a session once: only what is common to members is found.
    assert any(book[4] for book in books[0]) == (sharing == "icarus")
    assert told(run)["throughput"] is not None


def test_the_page_tells_what_is_near_and_what_is_missed() -> None:
    good = {"throughput": 1.05, "ttft p95": 0.8, "tpot p95": 1.0, "session p95": None}
    assert within(good, 0.5) == {"throughput": True, "ttft p95": True, "tpot p95": True}
    assert within({**good, "ttft p95": 0.7}, 0.5)["ttft p95"] is False
    assert within({**good, "ttft p95": 0.1}, 3.0) == {"throughput": True}
    assert TOLERANCE == {"throughput": 0.10, "p95": 0.25}
    names = (
        "throughput",
        "ttft p50",
        "ttft p95",
        "tpot p50",
        "tpot p95",
        "session p50",
        "session p95",
        "hits",
    )
    point = {
        "sharing": "sun",
        "load": 0.5,
        "simulated": dict.fromkeys(names, 1.0),
        "ratio": dict.fromkeys(names, 1.5),
        "within": within(dict.fromkeys(names, 1.5), 0.5),
    }
    about = {
        "shape": "24M",
        "dtype": "bfloat16",
        "threads": 1,
        "steps": {"held_out": 9},
        "error": {"median": 0.1, "p95": 0.2},
        "total": 1.0,
    }
    text = page([point], {"command": "c", "hardware": "h", "commit": "x", "date": "d"}, about)
    assert "Kept in 0 of 4 cells; missed: sun at 0.5: throughput 1.50x" in text
