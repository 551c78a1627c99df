"""Workers at equal service: fewer decode workers where members share them, and costs of one thread only."""

from dataclasses import replace

import pytest

from heliostat.bench.machines import measured_machine
from heliostat.bench.records import Limits
from heliostat.bench.workers import HEADS, compare, machine_of, markdown, told
from heliostat.bench.workloads import Lengths, Load
from heliostat.errors import Refused
from tests.unit.bench.test_sizing import COSTS

ABOUT = {
    "shape": "24M",
    "dtype": "bfloat16",
    "threads": 1,
    "page_bytes": 65_536,
    "error": {"median": 0.05, "p95": 0.2, "worst": 0.5},
    "birth": {"commit": "x"},
}
LIMITS = Limits(ttft=1.0, tpot=0.0125)
"""About four requests at a time keep it."""
LOAD = Load(
    members=("a", "b", "c", "d"),
    sessions=30,
    turns=1,
    popularity=1.2,
    assignment="draw",
    pause=0.1,
    lengths=Lengths(context=60, role=8, answer=20, observation=16),
)


def test_a_shared_decode_needs_fewer_workers_at_a_load_that_separate_models_keep() -> None:
    machine = measured_machine(replace(COSTS, about=ABOUT))
    found = compare(machine, LOAD, LIMITS, names=["sun"], about=ABOUT, loads=(0.5,))
    needs = {row["sharing"]: row for row in found.rows}
    # Half of what four workers keep: they suffice, and fewer that host all four models may, too.
    own = next(row for name, row in needs.items() if row["apart"] and name != "sun")
    assert own["decode"] == 4 >= needs["independent"]["decode"] > needs["sun"]["decode"] >= 1
    lines = {line[1]: line for line in told(found)}
    assert lines.keys() == needs.keys() and len(lines["sun"]) == len(HEADS)
    saved = needs["independent"]["decode"] / needs["sun"]["decode"]
    assert lines["sun"][4] == f"{saved:.2f}x" and lines["independent"][4] == "1.00x"
    page = markdown(found, {"command": "c", "hardware": "h", "commit": "x", "date": "d"})
    assert "kind (B)" in page and page.count("|") > 40


def test_costs_of_two_threads_are_no_worker_of_one_core() -> None:
    with pytest.raises(Refused, match="measured with 2 threads"):
        machine_of(replace(COSTS, about={**ABOUT, "threads": 2}))


def test_too_few_sessions_to_fill_a_worker_are_told() -> None:
    with pytest.raises(Refused, match="30 sessions do not fill"):
        compare(
            measured_machine(replace(COSTS, about=ABOUT)),
            LOAD,
            Limits(ttft=1.0, tpot=1.0),
            names=["sun"],
            about=ABOUT,
        )


def test_limits_that_separate_models_keep_at_no_load_are_refused() -> None:
    with pytest.raises(Refused, match="at no load"):
        compare(
            measured_machine(replace(COSTS, about=ABOUT)),
            LOAD,
            Limits(ttft=1.0, tpot=0.001),
            names=["sun"],
            about=ABOUT,
        )
