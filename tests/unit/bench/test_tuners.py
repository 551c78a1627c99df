"""Accuracy of tuners: the plan that is told, the table, resumption, steps to equal loss; on a tiny setting."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from heliostat.bench import results, tuners
from heliostat.bench.methods import METHODS, TUNED
from heliostat.bench.trial import Trial, kept_at, recipe_of
from heliostat.errors import Refused
from heliostat.files import atomic_write_text

LITTLE = [m for m in TUNED if m.name == "LoRA"]
LITTLE += [replace(m, against="LoRA") for m in TUNED if m.name == "LoRA, DropBP 0.875 uniform"]


def pretend(folder: Path, trials: Sequence[Trial], **how: Any) -> None:
    """What trials leave behind, without training: the table and its machinery are what is tested here."""
    for trial in trials:
        path = kept_at(folder, trial)
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        right = "1101" if trial.dropbp == 0 else "1000"
        found = {
            "trial": {},
            "seconds": 1.0,
            "validation": 0.5 + 10 * trial.learning_rate,
            "test": right.count("1") / 4,
            "verdicts": right,
            "history": [[10 * n, 3.0 / n + trial.dropbp] for n in range(1, 9)],
        }
        atomic_write_text(path, json.dumps(found))


@pytest.fixture
def pretending(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """run_all that only pretends; the numbers of trials that it was given."""
    seen: list[int] = []

    def run_all(folder: Path, trials: Sequence[Trial], **how: Any) -> None:
        seen.append(sum(not kept_at(folder, t).exists() for t in trials))
        pretend(folder, trials)

    monkeypatch.setattr(results, "run_all", run_all)
    return seen


def test_every_method_tries_as_many_rates_and_is_compared_with_one_of_the_table() -> None:
    assert len({len(method.rates) for method in (*TUNED, *METHODS)}) == 1
    assert {method.against for method in TUNED} <= {method.name for method in TUNED}
    assert len({method.name for method in TUNED}) == len(TUNED)


def test_trials_that_were_kept_before_keep_their_names() -> None:
    old = Trial(task="tools", sharing="icarus", tuner="lora", learning_rate=6e-3, seed=1, steps=400)
    assert old.name == "tools-icarus-lora-0.006-s1-400"
    names = {t.name for m in TUNED for t in results.search("tools", m, 400)}
    assert len(names) == sum(len(m.rates) for m in TUNED)


def test_a_trial_is_the_recipe_it_says(tmp_path: Path) -> None:
    (method,) = [m for m in TUNED if m.name == "LoRA, DropBP 0.875 uniform"]
    recipe = recipe_of(results.search("tools", method, 4)[0], tmp_path, tmp_path / "data.jsonl")
    assert (recipe.dropbp, recipe.dropbp_rates, recipe.r, recipe.tuner) == (0.875, "uniform", 16, "lora")
    (method,) = [m for m in TUNED if m.columns == "norm"]
    recipe = recipe_of(results.search("tools", method, 4)[0], tmp_path, tmp_path / "data.jsonl")
    assert (recipe.columns, recipe.r, recipe.tuner) == ("norm", 32, "paca")


def test_it_says_how_many_trials_it_will_run_and_then_runs_only_what_is_missing(
    tmp_path: Path, pretending: list[int]
) -> None:
    items = {"train_items": 40, "test_items": 4, "validation_items": 4}
    how: dict[str, Any] = {"steps": 80, "workers": 1, "methods": LITTLE, **items}
    said = io.StringIO()
    first = tuners.measure(tmp_path, ["tools"], console=Console(file=said, width=300), **how)
    assert "10 trials of 80 steps" in said.getvalue() and "0 are there, 10 to run" in said.getvalue()
    assert sum(pretending) == 10
    said, pretending[:] = io.StringIO(), []
    assert tuners.measure(tmp_path, ["tools"], console=Console(file=said, width=300), **how) == first
    assert "10 are there, 0 to run" in said.getvalue() and sum(pretending) == 0
    table = first["tools"]
    assert table["LoRA"]["learning_rate"] == max(LITTLE[0].rates)  # the best on validation items
    assert table["LoRA, DropBP 0.875 uniform"]["points"] == -50
    page = tuners.write(tmp_path / "docs", first, birth()).read_text(encoding="utf-8")
    assert "| LoRA | 75.0% |" in page and "| LoRA, DropBP 0.875 uniform | 1.4057 | never |" in page
    assert (
        "- LoRA, DropBP 0.875 uniform against LoRA: -50.0 points, no difference shown" in page
    )  # of 4 items
    assert (tmp_path / "docs" / "tuners-tools.svg").exists()


def birth() -> dict[str, Any]:
    return {
        "command": "c",
        "hardware": "h",
        "commit": "x",
        "date": "d",
        "versions": {},
        "seeds": [0, 1, 2],
        "steps": 80,
    }


def test_steps_to_a_loss_are_the_first_from_which_the_mean_is_there() -> None:
    history = [[10 * n, loss] for n, loss in enumerate([9, 5, 4, 3, 3, 3, 3, 2, 1], start=1)]
    assert tuners.final_loss(history) == pytest.approx(2.4)
    assert tuners.steps_to(history, 3.2) == 70
    assert tuners.steps_to(history, 0.1) is None


def test_methods_are_asked_for_by_name_with_what_they_are_compared_with() -> None:
    assert [m.name for m in tuners.chosen_methods("LoRA;PaCA")] == ["LoRA", "PaCA"]
    with pytest.raises(Refused, match="no method is called 'Lora'"):
        tuners.chosen_methods("Lora")
    with pytest.raises(Refused, match="compared with 'LoRA'"):
        tuners.chosen_methods("PaCA")


def test_a_verdict_is_what_the_interval_says() -> None:
    table = {
        "a": {"seeds": [0.8, 0.9]},
        "b": {"seeds": [0.85, 0.87], "points": 1.0, "interval": [-0.5, 2.5], "against": "a"},
        "c": {"seeds": [0.7, 0.7], "points": -15.0, "interval": [-18.0, -12.0], "against": "a"},
        "d": {"seeds": [0.95, 0.95], "points": 10.0, "interval": [8.0, 12.0], "against": "a"},
    }
    assert tuners.verdicts(table) == [
        "- b against a: +1.0 points, no difference shown, within the spread of its seeds.",
        "- c against a: -15.0 points, worse, outside the spread of its seeds.",
        "- d against a: +10.0 points, better.",
    ]
