"""Longer runs and wider adapters: which trials, and the page."""

from heliostat.bench import reach
from heliostat.bench.birth import certificate
from heliostat.bench.methods import METHODS

RATES = {method.name: method.rates[1] for method in METHODS}
ACCURACY = {
    "birth": {"steps": 10},
    "tasks": {"math": {name: {"learning_rate": rate, "seeds": [0.5, 0.9]} for name, rate in RATES.items()}},
}


def test_every_method_runs_longer_at_the_rate_of_the_table() -> None:
    found = reach.longer(ACCURACY, "math")
    assert {trial.steps for trial in found.values()} == {30}
    assert {name: trial.learning_rate for name, trial in found.items()} == RATES
    assert len({trial.name for trial in found.values()}) == len(METHODS)


def test_wider_adapters_are_tried_at_lower_rates_of_their_own() -> None:
    found = reach.wider(reach.longer(ACCURACY, "math"))
    assert set(found) == {method.name for method in METHODS if method.tuner == "lora"}
    for name, tried in found.items():
        assert {trial.r for trial in tried} == {64} and {trial.steps for trial in tried} == {30}
        assert [trial.learning_rate for trial in tried] == [RATES[name] / 2, RATES[name] / 4]


def test_the_page_compares_within_a_column() -> None:
    table = {
        "full fine-tune": {"10 steps": 0.5, "30 steps": 0.75},
        "SUN": {"10 steps": 0.25, "30 steps": 0.75},
        "LoRA": {"10 steps": 0.5, "30 steps": 0.5, "30 steps, r 64": 0.625},
        "ICaRus": {"10 steps": 0.5, "30 steps": 0.5, "30 steps, r 64": 0.5},
        "control: SUN's writer": {"10 steps": 0.25, "30 steps": 0.5},
    }
    made = reach.page({"math": {"birth": certificate("the command"), "table": table}})
    assert "| | 10 steps | 30 steps | 30 steps, r 64 |" in made and "the command" in made
    assert "| SUN | 25.0 % (-25.0) | 75.0 % (+0.0) |  |" in made
    assert "| control: SUN's writer | 25.0 % (-25.0) | 50.0 % (-25.0) |  |" in made
    assert "| ICaRus | 50.0 % (+0.0) | 50.0 % (+0.0) | 50.0 % (-12.5) |" in made
