"""Accuracy of members whose frozen half lies in codebooks: tuned through it, and untrained for it. Resumable.

The accuracy table's way (``bench.results``): as many learning rates for each method, chosen on validation items with
seed 0, then three seeds on test items. Trials are kept; run it again and only what is missing is done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from heliostat.bench.accuracy_page import rows_of
from heliostat.bench.birth import certificate
from heliostat.bench.methods import FORMATS, LOW_BIT, METHODS, Method
from heliostat.bench.results import (
    SEEDS,
    STEPS,
    against,
    choose_and_repeat,
    kept_result,
    method_rows,
    run_all,
)
from heliostat.bench.trial import QUANTIZED, Trial, as_half
from heliostat.build import module_folder, read_family
from heliostat.files import atomic_write_text, read_json
from heliostat.model.quantized import read_quantization
from heliostat.plot import bars
from heliostat.tasks import TASKS

PAGE = "qsun"


def measure(
    folder: Path, tasks: Sequence[str], groups: Sequence[str], *, steps: int, workers: int, console: Console
) -> dict[str, Any]:
    """What is missing of these groups of methods is run; returns the tables, by task."""
    tables: dict[str, Any] = {task: {} for task in tasks}
    how: dict[str, Any] = {"workers": workers, "console": console}
    for group in groups:
        methods = LOW_BIT[group]
        for task, chosen in choose_and_repeat(folder, tasks, methods, steps=steps, **how):
            tables[task] |= method_rows(folder, chosen, methods)
            plain = chosen[methods[0].name]
            for name, half in swapped(group).items():
                ordinary = [replace(plain, seed=seed) for seed in SEEDS]
                run_all(folder, ordinary, half=half, **how)
                tables[task][f"{methods[0].name}, {name}"] = _row(folder, ordinary, half, methods[0])
            console.print(*rows_of(tables[task]), sep="\n")
    return tables


def swapped(group: str) -> dict[str, str]:
    """Rows that nothing is tuned for, by what is said of them: ``as_half``'s words."""
    halves = {}
    for name, format in FORMATS.items():
        bits = name.removeprefix("base-").replace("bit", " bit")
        if group == "independent":
            halves[f"quantized afterwards, {bits}"] = f"{QUANTIZED}@{format}"
        else:
            halves[f"{bits} put in afterwards"] = f"{group}@{name}"
    return halves


def _row(folder: Path, ordinary: Sequence[Trial], half: str, method: Method) -> dict[str, Any]:
    found = [as_half(trial, half, folder) for trial in ordinary]
    theirs = [kept_result(folder, trial)["verdicts"] for trial in ordinary]
    row = {"seeds": [one["test"] for one in found]}
    return row | against([one["verdicts"] for one in found], theirs, replace(method, against=method.name))


def modules(folder: Path) -> dict[str, Any]:
    """The modules that members were tuned through: format, bits a weight, perplexity before and after."""
    family, found = read_family(folder / "family"), {}
    for name in FORMATS:
        if name in family.modules:
            quantization = read_quantization(module_folder(folder / "family", family.module(name)))
            assert quantization is not None
            found[name] = {"format": str(quantization.format), **quantization.report}
    return found


def page(
    tables: Mapping[str, Any],
    made: Mapping[str, Any],
    speed: Mapping[str, Any] | None,
    birth: Mapping[str, Any] | None,
) -> str:
    """What there is as a page; ``birth``: of the accuracy, None where none was measured."""
    parts = ["# Frozen halves in codebooks", ""]
    if birth is not None:
        parts += [*_preface(birth), *_modules_table(made)]
    for task, table in tables.items():
        parts += [
            f"## {task}: {TASKS[task].what}",
            "",
            *rows_of(table),
            "",
            f"![right answers]({PAGE}-{task}.svg)",
            "",
        ]
    return "\n".join([*parts, *(_speed_table(speed) if speed is not None else [])])


def _preface(birth: Mapping[str, Any]) -> list[str]:
    return [
        f"Each number: mean over {len(birth['seeds'])} seeds of the share of right greedy answers to 1,000 held-out items; "
        f"{birth['steps']} steps of 32 examples. {len(METHODS[0].rates)} learning rates were tried for each method with one",
        "seed and judged on 300 other items. Points: difference on the same items, 95 % paired bootstrap interval.",
        "`4 bit` and `2 bit` were tuned through the quantized module; what says `afterwards` was not tuned for it.",
        "",
        f"`{birth['command']}`; {birth['hardware']}; commit {birth['commit']}; {birth['date']}; "
        + ", ".join(f"{k} {v}" for k, v in birth["versions"].items()),
        "",
    ]


def _modules_table(made: Mapping[str, Any]) -> list[str]:
    rows = [
        "| module | format | bits a weight, all counted | perplexity before | after |",
        "|---|---|---|---|---|",
    ]
    for name, told in made.items():
        before, after = told["perplexity"]
        rows.append(f"| {name} | {told['format']} | {told['bits']:.2f} | {before:.3f} | {after:.3f} |")
    return [*rows, ""]


def _speed_table(speed: Mapping[str, Any]) -> list[str]:
    rows = [
        "## Decoding",
        "",
        f"Tokens a second of decode steps of the engine, a {speed['shape']} shape with random weights, medians of "
        f"{speed['repeats']} pairs measured in turns. Linears: {speed['megabytes'][0]:.0f} MB in 16 bits, "
        f"{speed['megabytes'][1]:.0f} MB in codebooks ({speed['format']}), "
        "without the kernel's copy of the codes (as much again) and the plain weights kept for many rows.",
        "",
        f"`{speed['birth']['command']}`; {speed['birth']['hardware']}; commit {speed['birth']['commit']}; "
        f"{speed['birth']['date']}",
        "",
        "| batch | plain speaker | in codebooks | ratio |",
        "|---|---|---|---|",
    ]
    for batch, row in speed["batches"].items():
        rows.append(f"| {batch} | {row['plain']:.0f} | {row['coded']:.0f} | {row['ratio']:.2f} |")
    return [*rows, ""]


def write(docs: Path, tables: Mapping[str, Any], made: Mapping[str, Any], birth: Mapping[str, Any]) -> Path:
    """qsun.json, qsun.md and its pictures in ``docs``; a speed that was measured (``bench.qsun_decode``) stays."""
    docs.mkdir(parents=True, exist_ok=True)
    kept = docs / f"{PAGE}.json"
    speed = read_json(kept).get("speed") if kept.exists() else None
    told = {"birth": birth, "modules": made, "tasks": tables, "speed": speed}
    atomic_write_text(kept, json.dumps(told, indent=1) + "\n")
    for task, table in tables.items():
        means = {name: 100 * sum(row["seeds"]) / len(row["seeds"]) for name, row in table.items()}
        edges = {n: (100 * min(row["seeds"]), 100 * max(row["seeds"])) for n, row in table.items()}
        title = f"{task}: right answers, mean of {len(birth['seeds'])} seeds"
        atomic_write_text(docs / f"{PAGE}-{task}.svg", bars(means, title=title, unit="%", intervals=edges))
    path = docs / f"{PAGE}.md"
    atomic_write_text(path, page(tables, made, speed, birth))
    return path


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/qsun"), help="family, trials, logs")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), help="table and pictures")
    parser.add_argument("--tasks", default="tools")
    parser.add_argument("--groups", default=",".join(LOW_BIT), help="of methods: " + ", ".join(LOW_BIT))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2, help="trials at once, one thread each")
    given = parser.parse_args()
    tasks, groups = given.tasks.split(","), given.groups.split(",")
    console = Console(stderr=True)
    tables = measure(given.out, tasks, groups, steps=given.steps, workers=given.workers, console=console)
    command = (
        f"python -m heliostat.bench.qsun --tasks {given.tasks} --groups {given.groups} --steps {given.steps}"
    )
    birth = certificate(command, seeds=list(SEEDS), steps=given.steps)
    print(write(given.docs, tables, modules(given.out), birth))


if __name__ == "__main__":
    main()
