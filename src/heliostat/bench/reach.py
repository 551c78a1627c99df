"""How far longer runs and wider adapters reach, beside the accuracy table: one seed, rates that the table chose.

Resumable, as the table is: trials are kept, and run again only what is missing is done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from heliostat.bench.birth import certificate
from heliostat.bench.methods import METHODS, RANK
from heliostat.bench.results import CONTROLS, SEEDS, best, run_all
from heliostat.bench.trial import Trial, ensure_family, kept_at, write_data
from heliostat.files import atomic_write_text, read_json

LONGER = 3
"""How many times as long as the table's the runs are."""
WIDER_RANK = 64
WIDER_RATES = (0.5, 0.25)
"""Of the rate that the table chose for its rank: a wider adapter takes larger steps at the same rate."""


def longer(accuracy: Mapping[str, Any], task: str) -> dict[str, Trial]:
    """Method -> its trial with more steps, at the rate that the table chose."""
    return {
        method.name: Trial(
            task=task,
            sharing=method.sharing,
            tuner=method.tuner,
            learning_rate=accuracy["tasks"][task][method.name]["learning_rate"],
            seed=SEEDS[0],
            steps=LONGER * accuracy["birth"]["steps"],
        )
        for method in METHODS
    }


def wider(trials: Mapping[str, Trial]) -> dict[str, list[Trial]]:
    """Method with an adapter -> its trials at the wider rank, one for each rate."""
    return {
        name: [replace(trial, r=WIDER_RANK, learning_rate=trial.learning_rate * part) for part in WIDER_RATES]
        for name, trial in trials.items()
        if trial.tuner == "lora"
    }


def measure(
    folder: Path, accuracy: Mapping[str, Any], task: str, *, workers: int, console: Console
) -> dict[str, dict[str, float]]:
    """Method or control -> what was changed -> right answers; the table's own number first."""
    trials = longer(accuracy, task)
    wide, full = wider(trials), trials[METHODS[0].name]
    write_data(full, folder)  # once, before several processes want it
    how: dict[str, Any] = {"workers": workers, "console": console}
    run_all(folder, [*trials.values(), *(t for found in wide.values() for t in found)], **how)
    table = accuracy["tasks"][task]
    short, long = f"{accuracy['birth']['steps']} steps", f"{full.steps} steps"
    found = {name: {short: table[name]["seeds"][0]} for name in (*trials, *CONTROLS)}
    for name, trial in trials.items():
        found[name][long] = read_json(kept_at(folder, trial))["test"]
    for name, tried in wide.items():
        found[name][f"{long}, r {WIDER_RANK}"] = read_json(kept_at(folder, best(folder, tried)))["test"]
    for name, sharing in CONTROLS.items():
        run_all(folder, [full], half=sharing, **how)
        found[name][long] = read_json(kept_at(folder, full, sharing))["test"]
    return found


def page(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables as a page, each with its certificate."""
    lines = [
        "# Longer runs and wider adapters",
        "",
        f"Right answers to the 1,000 held-out items of [accuracy](accuracy.md), seed {SEEDS[0]}, at its rates;",
        f"adapters have rank {RANK} where none is named. For rank {WIDER_RANK} half and a quarter of the rate were tried",
        "where nothing else is said, and the better on validation items was taken. A control is the full fine-tune of",
        "its column in a row that it was not trained for. In brackets: points to what a line is compared with, in",
        "the same column.",
        "",
    ]
    for task, facts in tasks.items():
        birth = facts["birth"]
        told = f"`{birth['command']}`; {birth['hardware']}; commit {birth['commit']}; {birth['date']}"
        lines += [f"## {task}", "", told, "", *rows_of(facts["table"]), ""]
    return "\n".join(lines)


def rows_of(table: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One table, line by line."""
    columns = list(dict.fromkeys(what for row in table.values() for what in row))
    against = dict.fromkeys(CONTROLS, METHODS[0].name) | {m.name: m.against for m in METHODS}
    found = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in table.items():
        cells = [_cell(row.get(c), table[against[name]].get(c), same=against[name] == name) for c in columns]
        found.append(f"| {name} | {' | '.join(cells)} |")
    return found


def _cell(own: float | None, other: float | None, *, same: bool) -> str:
    if own is None:
        return ""
    points = "" if same or other is None else f" ({100 * (own - other):+.1f})"
    return f"{100 * own:.1f} %{points}"


def main(given: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the page; tables of other tasks stay as they were."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/results"), help="family, trials, logs")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), help="accuracy.json, and the page")
    parser.add_argument("--tasks", help="some of the table's tasks, by comma; all if left out")
    parser.add_argument("--workers", type=int, default=2, help="trials at once, one thread each")
    wish = parser.parse_args(given)
    accuracy = read_json(wish.docs / "accuracy.json")
    tasks = wish.tasks.split(",") if wish.tasks else list(accuracy["tasks"])
    ensure_family(wish.out)
    how: dict[str, Any] = {"workers": wish.workers, "console": Console(stderr=True)}
    kept = wish.docs / "reach.json"
    found = read_json(kept)["tasks"] if kept.is_file() else {}
    for task in tasks:
        table = measure(wish.out, accuracy, task, **how)
        birth = certificate(f"python -m heliostat.bench.reach --tasks {task}", seeds=[SEEDS[0]])
        found[task] = {"birth": birth, "table": table}
        ordered = {name: found[name] for name in accuracy["tasks"] if name in found}
        atomic_write_text(kept, json.dumps({"tasks": ordered}, indent=1) + "\n")
        atomic_write_text(wish.docs / "reach.md", page(ordered))
    print(wish.docs / "reach.md")


if __name__ == "__main__":
    main()
