"""Costs: a step's short description is that of its passes, a fit finds what made the numbers, bad tables are refused."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.bench.costs import (
    KNOTS,
    PARTS,
    Fitted,
    Work,
    counted,
    errors,
    fit,
    read_costs,
    works_in,
    works_of,
)
from heliostat.engine.batch import passes_of
from heliostat.engine.page_table import PageTable
from heliostat.engine.request import Request, Sampling
from heliostat.engine.scheduler import Scheduler
from heliostat.errors import Refused
from heliostat.family import SHARINGS

RUNS = {"base": ("base", None)} | {
    name: ("base", name) if name.startswith("ad") else (name, None) for name in ("one", "two", "ad1", "ad2")
}
ROWS = [s.instantiate(own) for s in SHARINGS.values() for own in ("one", "two", "ad1", "ad2")]
FREE = dict.fromkeys(PARTS, 0.0)


@settings(max_examples=60, deadline=None)
@given(
    asked=st.lists(
        st.tuples(st.sampled_from(ROWS), st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=8
    ),
    budget=st.integers(8, 64),
)
def test_what_is_told_of_a_step_is_what_its_passes_hold(asked: list, budget: int) -> None:
    scheduler = Scheduler(
        PageTable(200, page_size=4), max_length=100, max_tokens_per_step=budget, max_running=8
    )
    for number, (row, prompt, answer) in enumerate(asked):
        scheduler.add(
            Request(
                str(number),
                row=row,
                digests={name: name for name in row.modules},
                prompt=tuple(range(number, number + prompt)),
                sampling=Sampling(max_tokens=answer),
            )
        )
    while scheduler.unfinished:
        step = scheduler.schedule()
        passes = works_in(passes_of(step, RUNS, page_size=4))
        assert works_of(step, RUNS) == passes
        scheduler.commit(step, {c.request.id: 7 for c in step.chunks if c.speaker is not None})


def test_seconds_are_the_sum_over_what_is_counted() -> None:
    dice = random.Random(0)
    coefficients = {name: dice.random() for name in PARTS}
    costs = Fitted(coefficients)
    for _ in range(50):
        works = [
            Work("w", *(dice.randrange(0, 3000) for _ in range(8)))  # each of its eight counts
            for _ in range(dice.randint(1, 3))
        ]
        for work in works:
            work.rows += 1
        expected = sum(n * coefficients[name] for name, n in zip(PARTS, counted(works), strict=True))
        assert costs.seconds(works) == pytest.approx(expected)


def test_a_pass_between_two_knots_lies_on_the_line_between_them() -> None:
    costs = Fitted(FREE | {"pass of 4": 1.0, "pass of 8": 3.0, "pass of 2048": 10.0})
    assert costs.seconds([Work("w", rows=6)]) == 2.0
    assert costs.seconds([Work("w", prompt_rows=4096)]) == 20.0
    assert [costs.seconds([Work("w", rows=knot)]) for knot in KNOTS[2:4]] == [1.0, 3.0]


def test_a_fit_finds_the_coefficients_that_made_the_numbers() -> None:
    dice = random.Random(1)
    true = [0.5, 0.0, 2.0, 0.25]
    counts = [[1.0, *(dice.uniform(0, 20) for _ in true[1:])] for _ in range(60)]
    samples = [(row, sum(a * b for a, b in zip(row, true, strict=True))) for row in counts]
    found = fit(samples)
    assert found == pytest.approx(true, abs=1e-6)
    assert errors(found, samples)[-1] < 1e-6


def test_no_coefficient_is_below_nothing() -> None:
    falling = [([1.0, float(n)], 10.0 - n) for n in range(1, 6)]
    assert min(fit(falling)) >= 0.0
    with pytest.raises(Refused, match="nothing was measured"):
        fit([])


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    costs = Fitted(FREE | {"step": 0.25}, 1e-9, 0.001, about={"shape": "24M"})
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(costs.to_json()), encoding="utf-8")
    assert read_costs(path) == costs


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "cannot be read"),
        ("[]", "no table of costs"),
        ("{}", "no table of costs"),
        (json.dumps(Fitted(FREE).to_json() | {"coefficients": {"step": 1}}), "they must have exactly"),
        (json.dumps(Fitted(FREE).to_json() | {"hop": -1}), "hop is -1"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(Refused, match=why):
        read_costs(path)
    with pytest.raises(Refused, match="cannot be read"):
        read_costs(tmp_path / "none.json")
