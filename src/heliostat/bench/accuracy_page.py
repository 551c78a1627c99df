"""The accuracy table as people see it: docs/results/accuracy.md with its pictures, and the README's short table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heliostat.bench.methods import METHODS
from heliostat.files import atomic_write_text
from heliostat.plot import bars, lines
from heliostat.tasks import TASKS

BEGIN, END = "<!-- accuracy -->", "<!-- /accuracy -->"
"""Between these lines the README's table stands."""


def write(folder: Path, tables: Mapping[str, Any], birth: Mapping[str, Any]) -> Path:
    """accuracy.json, accuracy.md and its pictures in ``folder``; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(
        folder / "accuracy.json", json.dumps({"birth": birth, "tasks": tables}, indent=1) + "\n"
    )
    parts = ["# Accuracy of every sharing on the embedded tasks", "", *_preface(birth), ""]
    for task, table in tables.items():
        means = {name: 100 * sum(row["seeds"]) / len(row["seeds"]) for name, row in table.items()}
        edges = {n: (100 * min(row["seeds"]), 100 * max(row["seeds"])) for n, row in table.items()}
        picture = bars(
            means,
            title=f"{task}: right answers, mean of {len(birth['seeds'])} seeds",
            unit="%",
            intervals=edges,
        )
        atomic_write_text(folder / f"accuracy-{task}.svg", picture)
        curves = {n: [(s, x) for s, x in row["history"]] for n, row in table.items() if "history" in row}
        drawn = lines(curves, title=f"{task}: training loss, seed 0", x="step", y="nats an answer token")
        atomic_write_text(folder / f"loss-{task}.svg", drawn)
        parts += [f"## {task}: {TASKS[task].what}", "", *rows_of(table), ""]
        parts += [f"![right answers](accuracy-{task}.svg) ![loss](loss-{task}.svg)", ""]
    page = folder / "accuracy.md"
    atomic_write_text(page, "\n".join(parts))
    return page


def _preface(birth: Mapping[str, Any]) -> list[str]:
    rates = len(METHODS[0].rates)
    return [
        f"Each number: mean over {len(birth['seeds'])} seeds of the share of right greedy answers to 1,000 held-out items; "
        f"{birth['steps']} steps of 32 examples. {rates} learning rates were tried for each method and task with one "
        "seed and judged on 300 other items. Points: difference on the same items, 95 % paired bootstrap interval.",
        "A control is the full fine-tune put into a shared row as it is.",
        "",
        f"`{birth['command']}`; {birth['hardware']}; commit {birth['commit']}; {birth['date']}; "
        + ", ".join(f"{k} {v}" for k, v in birth["versions"].items()),
    ]


def rows_of(table: Mapping[str, Any]) -> list[str]:
    """The table of one task, line by line."""
    found = ["| | right answers | by seed | points | rate |", "|---|---|---|---|---|"]
    for name, row in table.items():
        mean = sum(row["seeds"]) / len(row["seeds"])
        points = ""
        if "points" in row:
            low, high = row["interval"]
            points = f"{row['points']:+.1f} [{low:+.1f}, {high:+.1f}] against {row['against']}"
        seeds = ", ".join(f"{100 * s:.1f}" for s in row["seeds"])
        found.append(f"| {name} | {mean:.1%} | {seeds} | {points} | {row.get('learning_rate', '')} |")
    return found


def write_readme(path: Path, tables: Mapping[str, Any]) -> None:
    """Replace the table between the marks of a README, which must have both."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{path} has no {BEGIN} ... {END}"
    atomic_write_text(path, before + "\n".join([BEGIN, "", *short_rows(tables), "", END]) + after)


def short_rows(tables: Mapping[str, Any]) -> list[str]:
    """One line a method, one column a task: right answers, and the points to what it is compared with."""
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    found = [f"| | {' | '.join(tables)} |", "|---" * (len(tables) + 1) + "|"]
    for name in names:
        cells = [_cell(table[name]) for table in tables.values()]
        found.append(f"| {name} | {' | '.join(cells)} |")
    return found


def _cell(row: Mapping[str, Any]) -> str:
    points = f" ({row['points']:+.1f})" if "points" in row else ""
    return f"{100 * sum(row['seeds']) / len(row['seeds']):.1f} %{points}"
