"""Longer runs and wider adapters: which trials, and the page."""

from heliostat.bench import reach
from heliostat.bench.birth import certificate
from heliostat.bench.methods import METHODS

RATES = {method.name: method.rates[1] for method in METHODS}
ACCURACY = {
    "birth": {"steps": 10},
    "tasks": {"math": {name: {"learning_rate": rate, "seeds": [0.5, 0.9]} for name, rate in RATES.items()}},
}


def test_every_method_runs_longer_at_the_rate_of_the_table_and_adapters_wider_too() -> None:
    found = reach.longer(ACCURACY, "math")
    assert {trial.steps for trial in found.values()} == {30}
    assert all(trial.learning_rate == RATES[name] for name, trial in found.items())
    wide = reach.wider(found)
    assert set(wide) == {method.name for method in METHODS if method.tuner == "lora"}
    assert all(trial.r == 64 for tried in wide.values() for trial in tried)
    assert all(t.learning_rate < RATES[name] for name, tried in wide.items() for t in tried)
    names = [trial.name for trial in (*found.values(), *(t for tried in wide.values() for t in tried))]
    assert len(set(names)) == len(names)


def test_the_page_compares_within_a_column() -> None:
    table = {
        "full fine-tune": {"10 steps": 0.5, "30 steps": 0.75},
        "SUN": {"10 steps": 0.25, "30 steps": 0.75},
        "LoRA": {"10 steps": 0.5, "30 steps": 0.5, "30 steps, r 64": 0.625},
        "ICaRus": {"10 steps": 0.5, "30 steps": 0.5, "30 steps, r 64": 0.5},
    }
    made = reach.page({"math": table}, certificate("the command"))
    assert "| | 10 steps | 30 steps | 30 steps, r 64 |" in made and "the command" in made
    assert "| SUN | 25.0 % (-25.0) | 75.0 % (+0.0) |  |" in made
    assert "| ICaRus | 50.0 % (+0.0) | 50.0 % (+0.0) | 50.0 % (-12.5) |" in made
