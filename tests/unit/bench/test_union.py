"""One model for all tasks: tuned on all, judged on each, its rate chosen once; the page sets it beside others."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from rich.console import Console

from heliostat.bench import union
from heliostat.bench.methods import METHODS
from heliostat.bench.results import SEEDS
from heliostat.bench.trial import ensure_family
from heliostat.files import atomic_write_text
from heliostat.tasks import TASKS

FEW = {"train_items": 8, "test_items": 2, "validation_items": 2}


def test_a_model_learns_from_all_tasks_and_is_judged_on_each(tmp_path: Path) -> None:
    ensure_family(tmp_path)
    trial = union._trial(1e-3, 0, 1, FEW)
    found = union.run(trial, tmp_path)
    assert set(found["validation"]) == set(found["test"]) == set(TASKS)
    (recipe,) = (tmp_path / "family" / "runs").glob("union-*/recipe.yaml")
    assert all(f"{task}-train" in recipe.read_text(encoding="utf-8") for task in TASKS)
    assert union.run(trial, tmp_path) == found, "kept"


def test_the_best_rate_goes_on_with_the_other_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run_modules(waiting: Mapping[str, Sequence[str]], **how: Any) -> None:
        for name, words in waiting.items():
            rate = float(words[words.index("--trial") + 1])
            right = {task: 1 - 10 * abs(rate - METHODS[0].rates[1]) for task in TASKS}
            ran.append(name)
            (tmp_path / "trials").mkdir(exist_ok=True)
            kept = json.dumps({"validation": right, "test": right})
            atomic_write_text(tmp_path / "trials" / f"{name}.json", kept)

    monkeypatch.setattr(union, "run_modules", run_modules)
    found = union.measure(tmp_path, steps=4, workers=1, console=Console(quiet=True), **FEW)
    assert found["learning_rate"] == METHODS[0].rates[1]
    assert len(ran) == len(METHODS[0].rates) + len(SEEDS) - 1
    assert found["seeds"] == {task: [1.0] * len(SEEDS) for task in TASKS}


def test_the_page_sets_it_beside_a_model_for_each_task(tmp_path: Path) -> None:
    accuracy = {task: {name: {"seeds": [0.5, 0.7]} for name in union.BESIDE} for task in TASKS}
    found = {"learning_rate": 0.002, "tried": {"0.002": 0.5}, "seeds": {task: [0.6, 0.5] for task in TASKS}}
    birth = {"command": "c", "hardware": "h", "commit": "x", "date": "d", "versions": {}, "steps": 4}
    text = union.write(tmp_path, found, accuracy, birth).read_text(encoding="utf-8")
    assert text.count("55.0% (60.0, 50.0), -5.0") == len(TASKS)
    kept = json.loads((tmp_path / "union.json").read_text(encoding="utf-8"))["tasks"]
    assert all(rows[union.BESIDE[0]]["mean"] == pytest.approx(mean([0.5, 0.7])) for rows in kept.values())
    assert (tmp_path / "union.svg").exists()
