"""The accuracy table: paired differences, the choice of a rate, the page."""

from dataclasses import replace
from pathlib import Path

import pytest

from heliostat.bench import results
from heliostat.bench.trial import Trial
from heliostat.files import atomic_write_text


def test_paired_difference_is_the_mean_gap_and_its_interval_holds_it() -> None:
    ours, theirs = ["1" * 60 + "0" * 40], ["1" * 50 + "0" * 50]
    mean, low, high = results.paired_difference(ours, theirs)
    assert mean == pytest.approx(0.10)
    assert 0 < low < mean < high < 0.2


def test_equal_verdicts_differ_by_nothing() -> None:
    assert results.paired_difference(["1010"], ["1010"]) == (0, 0, 0)


def test_seeds_are_averaged_before_items_are_drawn() -> None:
    # Two seeds that disagree on every item: each item's mean gap is zero, so there is no spread at all.
    assert results.paired_difference(["10", "01"], ["01", "10"]) == (0, 0, 0)


def test_every_method_tries_as_many_rates() -> None:
    assert len({len(method.rates) for method in results.METHODS}) == 1
    assert {method.against for method in results.METHODS} <= {method.name for method in results.METHODS}


def test_the_best_rate_is_chosen_on_validation_items_alone(tmp_path: Path) -> None:
    method = replace(results.METHODS[0], rates=(1e-3, 2e-3, 5e-3))
    trials = results.search("tools", method, 10)
    for trial, validation, test in zip(trials, (0.5, 0.7, 0.6), (0.9, 0.1, 0.8), strict=True):
        (tmp_path / "trials").mkdir(exist_ok=True)
        text = f'{{"validation": {validation}, "test": {test}}}'
        atomic_write_text(tmp_path / "trials" / f"{trial.name}.json", text)
    assert results.best(tmp_path, trials) == trials[1]


def test_a_failed_trial_is_named_and_stops_the_rest(tmp_path: Path) -> None:
    from rich.console import Console

    trial = Trial(task="no-such-task", sharing="sun", tuner="full", learning_rate=1e-3, seed=0, steps=1)
    with pytest.raises(RuntimeError, match=trial.name):
        results.run_all(tmp_path, [trial], workers=1, console=Console(quiet=True))
