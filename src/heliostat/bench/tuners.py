"""Accuracy of tuners: columns beside low-rank adapters, in every sharing that takes them, and dropped branches. Resumable.

The accuracy table's way (``bench.results``): as many learning rates for each method, chosen on validation items with
seed 0, then three seeds on test items. Trials are kept; run it again and only what is missing is done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from heliostat.bench.accuracy_page import rows_of
from heliostat.bench.birth import certificate
from heliostat.bench.methods import RANK, TUNED, WIDE, Method
from heliostat.bench.results import SEEDS, STEPS, choose_and_repeat, method_rows, search
from heliostat.bench.trial import kept_at
from heliostat.errors import Refused
from heliostat.files import atomic_write_text
from heliostat.plot import bars, lines
from heliostat.tasks import TASKS

LAST = 5
"""Logged steps whose mean is called the final loss."""


def plan(
    folder: Path, tasks: Sequence[str], methods: Sequence[Method], *, steps: int, **items: int
) -> tuple[int, int]:
    """(trials in all, trials that are kept already): rates with one seed, then the other seeds of the best.

    Which trials are the other seeds' hangs on the rates: of those, kept ones are counted at any rate.
    """
    total = kept = 0
    for task in tasks:
        for method in methods:
            tried = search(task, method, steps, **items)
            total += len(tried) + len(SEEDS) - 1
            kept += sum(kept_at(folder, trial).exists() for trial in tried)
            kept += sum(
                any(
                    kept_at(folder, other).exists()
                    for other in search(task, method, steps, seed=seed, **items)
                )
                for seed in SEEDS[1:]
            )
    return total, kept


def measure(
    folder: Path,
    tasks: Sequence[str],
    *,
    steps: int,
    workers: int,
    console: Console,
    methods: Sequence[Method] = TUNED,
    **items: int,
) -> dict[str, Any]:
    """Everything, for the tasks; returns the tables. Says first how many trials it will run."""
    total, kept = plan(folder, tasks, methods, steps=steps, **items)
    console.print(
        f"{total} trials of {steps} steps: {len(methods)} methods, {len(methods[0].rates)} learning rates each, "
        f"{len(SEEDS)} seeds, {', '.join(tasks)}; {kept} are there, {total - kept} to run, {workers} at a time"
    )
    tables = {}
    how: dict[str, Any] = {"steps": steps, "workers": workers, "console": console, **items}
    for task, chosen in choose_and_repeat(folder, tasks, methods, **how):
        table = method_rows(folder, chosen, methods)
        for method in methods:
            row, against = table[method.name], table[method.against]
            row["final_loss"] = final_loss(row["history"])
            row["steps_to_equal_loss"] = steps_to(row["history"], final_loss(against["history"]))
        tables[task] = table
        console.print(*rows_of(table), sep="\n")
    return tables


def final_loss(history: Sequence[Sequence[float]]) -> float:
    """Mean of the last few logged losses."""
    last = [loss for _, loss in history[-LAST:]]
    return sum(last) / len(last)


def steps_to(history: Sequence[Sequence[float]], loss: float) -> int | None:
    """First logged step from which the mean of the last few losses is no more than ``loss``; None: never."""
    for end in range(min(LAST, len(history)), len(history) + 1):
        if final_loss(history[:end]) <= loss + 1e-9:
            return int(history[end - 1][0])
    return None


def page(tables: Mapping[str, Any], birth: Mapping[str, Any]) -> str:
    """The tables as a page."""
    parts = [
        "# Accuracy of tuners on the embedded tasks",
        "",
        f"Each number: mean over {len(birth['seeds'])} seeds of the share of right greedy answers to held-out items; "
        f"{birth['steps']} steps. {len(TUNED[0].rates)} learning rates were tried for each method with one seed and judged",
        "on other items. Points: difference on the same items, 95 % paired bootstrap interval. LoRA has rank "
        f"{RANK}, PaCA rank {WIDE}, which is about as many parameters, or {RANK} where it says equal rank.",
        "DropBP drops that share of the branches' backward pass: by sensitivity, or uniform.",
        "",
        f"`{birth['command']}`; {birth['hardware']}; commit {birth['commit']}; {birth['date']}; "
        + ", ".join(f"{k} {v}" for k, v in birth["versions"].items()),
        "",
        "How fast and how lean the tuners are: [tuning](tuning.md).",
        "",
    ]
    for task, table in tables.items():
        parts += [f"## {task}: {TASKS[task].what}", "", *rows_of(table), ""]
        parts += [
            "| | final training loss | steps to the loss of what it is compared with |",
            "|---|---|---|",
        ]
        for name, row in table.items():
            parts.append(f"| {name} | {row['final_loss']:.4f} | {row['steps_to_equal_loss'] or 'never'} |")
        parts += ["", f"![right answers](tuners-{task}.svg) ![loss](tuners-loss-{task}.svg)", ""]
        parts += ["Verdicts, from the table:", "", *verdicts(table), ""]
    return "\n".join(parts)


def verdicts(table: Mapping[str, Any]) -> list[str]:
    """What each interval says beside the method it is compared with, and whether the mean lies within its seeds."""
    found = []
    for name, row in table.items():
        if "points" not in row:
            continue
        other, (low, high) = row["against"], row["interval"]
        said = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
        least, most = min(table[other]["seeds"]), max(table[other]["seeds"])
        within = least <= sum(row["seeds"]) / len(row["seeds"]) <= most
        spread = "" if low > 0 else f", {'within' if within else 'outside'} the spread of its seeds"
        found.append(f"- {name} against {other}: {row['points']:+.1f} points, {said}{spread}.")
    return found


def write(folder: Path, tables: Mapping[str, Any], birth: Mapping[str, Any]) -> Path:
    """tuners.json, tuners.md and its pictures in ``folder``; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "tuners.json", json.dumps({"birth": birth, "tasks": tables}, indent=1) + "\n")
    for task, table in tables.items():
        means = {name: 100 * sum(row["seeds"]) / len(row["seeds"]) for name, row in table.items()}
        edges = {n: (100 * min(row["seeds"]), 100 * max(row["seeds"])) for n, row in table.items()}
        title = f"{task}: right answers, mean of {len(birth['seeds'])} seeds"
        atomic_write_text(folder / f"tuners-{task}.svg", bars(means, title=title, unit="%", intervals=edges))
        curves = {
            n: [(s, x) for s, x in row["history"]] for n, row in table.items() if "sun" not in n.lower()
        }
        drawn = lines(
            dict(list(curves.items())[:8]),
            title=f"{task}: training loss, seed 0",
            x="step",
            y="nats an answer token",
        )
        atomic_write_text(folder / f"tuners-loss-{task}.svg", drawn)
    atomic_write_text(folder / "tuners.md", page(tables, birth))
    return folder / "tuners.md"


def chosen_methods(names: str | None) -> Sequence[Method]:
    """The methods of these names, by semicolon; None: all.

    Raises:
        Refused: a name is not known, or what one is compared with is not among them.
    """
    if names is None:
        return TUNED
    wanted, known = names.split(";"), {method.name: method for method in TUNED}
    for name in wanted:
        if name not in known:
            raise Refused(f"no method is called {name!r}: " + "; ".join(known))
        if known[name].against not in wanted:
            raise Refused(f"{name!r} is compared with {known[name].against!r}: name that, too")
    return [known[name] for name in wanted]


def main(given: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/results"), help="family, trials, logs")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), help="table and pictures")
    parser.add_argument("--tasks", default="tools", help="by comma")
    parser.add_argument(
        "--methods", help="only these, by semicolon; what they are compared with must be among them"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2, help="trials at once, one thread each")
    for name in ("train-items", "test-items", "validation-items"):
        parser.add_argument(f"--{name}", type=int, help="where not the table's own number")
    wish = vars(parser.parse_args(given))
    out, docs, tasks, names = wish.pop("out"), wish.pop("docs"), wish.pop("tasks"), wish.pop("methods")
    try:
        methods = chosen_methods(names)
    except Refused as problem:
        parser.error(str(problem))
    wish = {name: value for name, value in wish.items() if value is not None}
    told = {"tasks": tasks, "methods": names and f'"{names}"', **wish}
    command = " ".join(
        ["python -m heliostat.bench.tuners"]
        + [
            f"--{name.replace('_', '-')} {value}"
            for name, value in told.items()
            if value and name != "workers"
        ]
    )
    console = Console(stderr=True)
    tables = measure(out, tasks.split(","), methods=methods, console=console, **wish)
    print(write(docs, tables, certificate(command, seeds=list(SEEDS), steps=wish["steps"])))


if __name__ == "__main__":
    main()
