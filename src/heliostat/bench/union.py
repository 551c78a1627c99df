"""One model tuned on all embedded tasks together, beside one model a task: why should there be members at all? Resumable.

It sees as many examples of each task as a task's own model, in as many steps as those have together; learning rates are
tried and chosen as theirs are. What it is set beside is read out of the accuracy table's results.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from heliostat.bench.birth import certificate
from heliostat.bench.methods import METHODS
from heliostat.bench.processes import run_modules
from heliostat.bench.results import SEEDS, STEPS
from heliostat.bench.trial import Trial, ensure_family, judge, recipe_of, write_data
from heliostat.build import read_family
from heliostat.files import atomic_write_text, read_json
from heliostat.plot import bars
from heliostat.tasks import TASKS

FULL = METHODS[0]
BESIDE = (FULL.name, "SUN")
"""Lines of the accuracy table that it is set beside."""


def kept_at(folder: Path, trial: Trial) -> Path:
    """Where the result of such a model lies; ``trial.task`` is any of its tasks, ``trial.steps`` all of its steps."""
    return folder / "trials" / f"{_member(trial)}.json"


def _member(trial: Trial) -> str:
    return f"union-{trial.tuner}-{trial.learning_rate:g}-s{trial.seed}-{trial.steps}"


def run(trial: Trial, folder: Path) -> dict[str, Any]:
    """Tune on the union of all tasks, and judge on each; kept, and not run again."""
    kept = kept_at(folder, trial)
    if kept.exists():
        return read_json(kept)
    from heliostat.train.tune import tune
    from heliostat.train.watch import Silent

    trials = {task: replace(trial, task=task) for task in TASKS}
    files = [str(write_data(each, folder)["train"]) for each in trials.values()]
    if _member(trial) not in read_family(folder / "family").members:
        recipe = recipe_of(trial, folder, Path(files[0]))
        recipe = recipe.model_copy(update={"member": _member(trial), "data": tuple(files)})
        tune(recipe, watching=lambda job: nullcontext(Silent()))
    row = read_family(folder / "family").row(_member(trial))
    found = {task: judge(each, row, folder) for task, each in trials.items()}
    result = {part: {task: judged[part] for task, judged in found.items()} for part in ("validation", "test")}
    kept.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(kept, json.dumps(result) + "\n")
    return result


def measure(folder: Path, *, steps: int, workers: int, console: Console, **items: int) -> dict[str, Any]:
    """Every learning rate with one seed, then the other seeds of the best; returns the table of its tasks."""
    tried = [_trial(rate, SEEDS[0], steps, items) for rate in FULL.rates]
    ensure_family(folder)
    for seed in SEEDS:  # written once, before several processes want them
        for task in TASKS:
            write_data(replace(tried[0], task=task, seed=seed), folder)
    _run_all(folder, tried, workers, console)
    judged = {t.learning_rate: mean(read_json(kept_at(folder, t))["validation"].values()) for t in tried}
    best = max(tried, key=lambda t: (judged[t.learning_rate], -t.learning_rate))
    seeds = [replace(best, seed=seed) for seed in SEEDS]
    _run_all(folder, seeds, workers, console)
    found = [read_json(kept_at(folder, trial))["test"] for trial in seeds]
    return {
        "learning_rate": best.learning_rate,
        "tried": {f"{rate:g}": share for rate, share in judged.items()},
        "seeds": {task: [one[task] for one in found] for task in TASKS},
    }


def _trial(rate: float, seed: int, steps: int, items: Mapping[str, int]) -> Trial:
    facts: dict[str, Any] = {"task": next(iter(TASKS)), "sharing": FULL.sharing, "tuner": FULL.tuner, **items}
    return Trial(learning_rate=rate, seed=seed, steps=steps, **facts)


def _run_all(folder: Path, trials: Sequence[Trial], workers: int, console: Console) -> None:
    waiting = {}
    for trial in trials:
        if not kept_at(folder, trial).exists():
            words = ["heliostat.bench.union", "--out", str(folder), "--trial", f"{trial.learning_rate:g}"]
            words += ["--seed", str(trial.seed), "--steps", str(trial.steps)]
            for name in ("train_items", "test_items", "validation_items"):
                words += [f"--{name.replace('_', '-')}", str(getattr(trial, name))]
            waiting[_member(trial)] = words
    run_modules(waiting, logs=folder / "logs", workers=workers, console=console)


def table(found: Mapping[str, Any], accuracy: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Task -> line -> seeds and points to what a task's own model has. ``accuracy``: tables of the accuracy results."""
    made = {}
    for task, seeds in found["seeds"].items():
        rows: dict[str, Any] = {name: {"seeds": accuracy[task][name]["seeds"]} for name in BESIDE}
        rows["one model for all tasks"] = {"seeds": seeds}
        own = mean(rows[FULL.name]["seeds"])
        for row in rows.values():
            row["mean"] = mean(row["seeds"])
            row["points"] = round(100 * (row["mean"] - own), 2)
        made[task] = rows
    return made


def page(made: Mapping[str, Any], found: Mapping[str, Any], birth: Mapping[str, Any]) -> str:
    """The table as a page."""
    names = list(next(iter(made.values())))
    parts = [
        "# One model for all tasks, or one for each",
        "",
        f"Right greedy answers to held-out items, mean of {len(SEEDS)} seeds, by seed in brackets; points to a task's own",
        f"full fine-tune. The one model is tuned in full on all tasks together, {birth['steps']} steps: each task's part is",
        f"what its own model has. Its rate, {found['learning_rate']:g}, is the best of {', '.join(found['tried'])},",
        "with seed 0 on other items. The other lines are those of the [accuracy table](accuracy.md).",
        "",
        f"`{birth['command']}`; {birth['hardware']}; commit {birth['commit']}; {birth['date']}; "
        + ", ".join(f"{k} {v}" for k, v in birth["versions"].items()),
        "",
        f"| | {' | '.join(made)} |",
        "|---" * (len(made) + 1) + "|",
    ]
    for name in names:
        cells = [_cell(rows[name]) for rows in made.values()]
        parts.append(f"| {name} | {' | '.join(cells)} |")
    parts += ["", "![right answers](union.svg)", ""]
    return "\n".join(parts)


def _cell(row: Mapping[str, Any]) -> str:
    seeds = ", ".join(f"{100 * share:.1f}" for share in row["seeds"])
    return f"{row['mean']:.1%} ({seeds}), {row['points']:+.1f}"


def write(
    folder: Path, found: Mapping[str, Any], accuracy: Mapping[str, Any], birth: Mapping[str, Any]
) -> Path:
    """union.json, union.md and the picture in ``folder``; returns the page."""
    made = table(found, accuracy)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(
        folder / "union.json", json.dumps({"birth": birth, **found, "tasks": made}, indent=1) + "\n"
    )
    shown = {
        f"{task}, {name}": 100 * row["mean"] for task, rows in made.items() for name, row in rows.items()
    }
    atomic_write_text(folder / "union.svg", bars(shown, title="right answers, mean of seeds", unit="%"))
    atomic_write_text(folder / "union.md", page(made, found, birth))
    return folder / "union.md"


def main(given: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the page; with ``--trial`` one model alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/results"), help="family, trials, logs")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), help="tables and pictures")
    parser.add_argument("--steps", type=int, default=len(TASKS) * STEPS)
    parser.add_argument("--workers", type=int, default=2, help="models at once, one thread each")
    parser.add_argument("--trial", type=float, help="tune and judge one model at this learning rate, and end")
    parser.add_argument("--seed", type=int, default=SEEDS[0], help="of that model")
    for name in ("train-items", "test-items", "validation-items"):
        parser.add_argument(f"--{name}", type=int, help="of each task, where not the table's own number")
    asked = parser.parse_args(given)
    numbers = {name: getattr(asked, name) for name in ("train_items", "test_items", "validation_items")}
    items = {name: number for name, number in numbers.items() if number is not None}
    if asked.trial is not None:
        import torch

        torch.set_num_threads(1)
        print(json.dumps(run(_trial(asked.trial, asked.seed, asked.steps, items), asked.out)["validation"]))
        return
    accuracy = read_json(asked.docs / "accuracy.json")["tasks"]
    console = Console(stderr=True)
    found = measure(asked.out, steps=asked.steps, workers=asked.workers, console=console, **items)
    command = f"python -m heliostat.bench.union --steps {asked.steps}"
    print(write(asked.docs, found, accuracy, certificate(command, seeds=list(SEEDS), steps=asked.steps)))


if __name__ == "__main__":
    main()
