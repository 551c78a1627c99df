"""All tasks, all sharings, several seeds, equal learning-rate trials: the accuracy table of the project. Resumable.

For each task and method the same number of learning rates is tried with seed 0 and judged on validation items; the
best goes on with the other seeds and is judged on test items that no choice ever saw. Trials run in processes of
their own, one thread each, and are kept: run it again and only what is missing is done.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from heliostat.bench.accuracy_page import rows_of, write, write_readme
from heliostat.bench.birth import certificate
from heliostat.bench.methods import FORMATS, METHODS, Method
from heliostat.bench.processes import run_modules
from heliostat.bench.trial import (
    Trial,
    as_half,
    base_alone,
    ensure_family,
    ensure_quantized,
    kept_at,
    write_data,
)
from heliostat.files import read_json
from heliostat.tasks import TASKS

SEEDS = (0, 1, 2)
STEPS = 400
BOOTSTRAPS = 2_000


CONTROLS = {"control: SUN's writer": "sun", "control: PrefillShare's speaker": "prefillshare"}


def search(task: str, method: Method, steps: int, *, seed: int = SEEDS[0], **items: int) -> list[Trial]:
    """The learning-rate trials of one method; ``items``: Trial's numbers of items, where they are not its own."""
    found = Trial(
        task=task,
        sharing=method.sharing,
        tuner=method.tuner,
        learning_rate=0.0,
        seed=seed,
        steps=steps,
        r=method.r,
        columns=method.columns,
        dropbp=method.dropbp,
        dropbp_rates=method.dropbp_rates,
        frozen=method.frozen,
        **items,
    )
    return [replace(found, learning_rate=rate) for rate in method.rates]


def best(folder: Path, trials: Sequence[Trial]) -> Trial:
    """The trial with the highest validation accuracy; of equals the smaller rate."""
    return max(trials, key=lambda t: (kept_result(folder, t)["validation"], -t.learning_rate))


def run_all(
    folder: Path, trials: Sequence[Trial], *, workers: int, console: Console, half: str | None = None
) -> None:
    """Run the trials that are missing, ``workers`` at a time; one that fails is named and stops the rest.

    ``half``: do not tune, but judge their modules as that half (see ``trial.main``).
    """
    waiting = [t for t in trials if not kept_at(folder, t, half).exists()]
    commands = {kept_at(folder, trial, half).stem: _words(folder, trial, half) for trial in waiting}
    run_modules(commands, logs=folder / "logs", workers=workers, console=console)


def _words(folder: Path, trial: Trial, half: str | None) -> list[str]:
    words = ["heliostat.bench.trial", "--folder", str(folder)]
    for name, value in asdict(trial).items():
        words += [f"--{name.replace('_', '-')}", str(value)] if value != "" else []
    return words + (["--as", half] if half else [])


def measure(
    folder: Path, tasks: Sequence[str], *, steps: int, workers: int, console: Console
) -> dict[str, Any]:
    """Everything, for the tasks; returns the table."""
    tables = {}
    for task, chosen in choose_and_repeat(
        folder, tasks, METHODS, steps=steps, workers=workers, console=console
    ):
        full = chosen[METHODS[0].name]
        for sharing in CONTROLS.values():
            ordinary = [replace(full, seed=seed) for seed in SEEDS]
            run_all(folder, ordinary, workers=workers, console=console, half=sharing)
        run_all(folder, [full], workers=workers, console=console, half="base")
        tables[task] = _task_table(folder, task, chosen)
        console.print(*rows_of(tables[task]), sep="\n")
    return tables


def choose_and_repeat(
    folder: Path,
    tasks: Sequence[str],
    methods: Sequence[Method],
    *,
    steps: int,
    workers: int,
    console: Console,
    **items: int,
) -> Iterator[tuple[str, dict[str, Trial]]]:
    """Run what is missing, one task after the other, so that what is done is whole: (task, the trial chosen by method)."""
    ensure_family(folder)
    for method in methods:
        if method.frozen:
            ensure_quantized(folder, method.frozen, FORMATS[method.frozen])
    for task in tasks:
        for seed in SEEDS:  # written once, before several processes want them
            write_data(replace(search(task, methods[0], steps, **items)[0], seed=seed), folder)
    for task in tasks:
        tried = [t for m in methods for t in search(task, m, steps, **items)]
        run_all(folder, tried, workers=workers, console=console)
        chosen = {m.name: best(folder, search(task, m, steps, **items)) for m in methods}
        seeds = [replace(trial, seed=seed) for trial in chosen.values() for seed in SEEDS]
        run_all(folder, seeds, workers=workers, console=console)
        yield task, chosen


def method_rows(folder: Path, chosen: Mapping[str, Trial], methods: Sequence[Method]) -> dict[str, Any]:
    """The methods' lines of one task's table, each beside the method it is compared with."""
    found = {
        name: [kept_result(folder, replace(trial, seed=seed)) for seed in SEEDS]
        for name, trial in chosen.items()
    }
    verdicts = {name: [one["verdicts"] for one in kept] for name, kept in found.items()}
    table = {}
    for method in methods:
        trial = chosen[method.name]
        rates = [replace(trial, learning_rate=rate, seed=SEEDS[0]) for rate in method.rates]
        table[method.name] = {
            "learning_rate": trial.learning_rate,
            "tried": {f"{t.learning_rate:g}": kept_result(folder, t)["validation"] for t in rates},
            "seeds": [one["test"] for one in found[method.name]],
            "seconds": [one["seconds"] for one in found[method.name]],
            "history": found[method.name][0]["history"],
        }
        table[method.name] |= against(verdicts[method.name], verdicts[method.against], method)
    return table


def _task_table(folder: Path, task: str, chosen: Mapping[str, Trial]) -> dict[str, Any]:
    full = chosen[METHODS[0].name]
    table: dict[str, Any] = {"base, untuned": {"seeds": [base_alone(full, folder)["test"]]}}
    table |= method_rows(folder, chosen, METHODS)
    ordinary = [kept_result(folder, replace(full, seed=seed))["verdicts"] for seed in SEEDS]
    for name, sharing in CONTROLS.items():
        found = [as_half(replace(full, seed=seed), sharing, folder) for seed in SEEDS]
        table[name] = {"seeds": [one["test"] for one in found]}
        table[name] |= against([one["verdicts"] for one in found], ordinary, METHODS[1])
    return table


def against(ours: Sequence[str], theirs: Sequence[str], method: Method) -> dict[str, Any]:
    """Difference in points to the method compared with, with a 95 % interval; none to itself."""
    if list(ours) == list(theirs):
        return {}
    mean, low, high = paired_difference(ours, theirs)
    return {
        "against": method.against,
        "points": round(100 * mean, 2),
        "interval": [round(100 * low, 2), round(100 * high, 2)],
    }


def paired_difference(
    ours: Sequence[str], theirs: Sequence[str], *, seed: int = 0
) -> tuple[float, float, float]:
    """Mean difference of accuracy and its 95 % bootstrap interval over items; verdicts are strings of 0 and 1 a seed.

    An item's difference is averaged over seeds first: seeds answer the same items and are not independent items.
    """
    items = len(ours[0])
    gaps = [
        sum(int(a[i]) - int(b[i]) for a, b in zip(ours, theirs, strict=True)) / len(ours)
        for i in range(items)
    ]
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(gaps, k=items)) / items for _ in range(BOOTSTRAPS))
    return sum(gaps) / items, means[int(0.025 * BOOTSTRAPS)], means[int(0.975 * BOOTSTRAPS)]


def kept_result(folder: Path, trial: Trial) -> dict[str, Any]:
    return read_json(kept_at(folder, trial))


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/results"), help="family, trials, logs")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), help="table and pictures")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--readme", type=Path, help="a README whose table is replaced")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2, help="trials at once, one thread each")
    given = parser.parse_args()
    console = Console(stderr=True)
    tables = measure(
        given.out, given.tasks.split(","), steps=given.steps, workers=given.workers, console=console
    )
    command = f"python -m heliostat.bench.results --tasks {given.tasks} --steps {given.steps}"
    page = write(given.docs, tables, certificate(command, seeds=list(SEEDS), steps=given.steps))
    if given.readme is not None:
        write_readme(given.readme, tables)
    print(page)


if __name__ == "__main__":
    main()
