"""Kinds of attention side by side, from scratch: losses, gradients, what heads look at, and what it costs. Resumable.

For each kind the same learning rates are tried with seed 0 and judged on held-out texts; the best goes on with the other
seeds and is judged on texts that no choice ever saw. Trials run in processes of their own and are kept: run it again and
only what is missing is done. ``--no-run`` writes the page of what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from heliostat.bench.attention_page import write
from heliostat.bench.attention_text import write as write_text
from heliostat.bench.birth import certificate
from heliostat.bench.processes import run_modules
from heliostat.bench.trial_attention import KINDS, SIZES, STEPS, AttentionTrial, kept_at, tokenizer_at
from heliostat.files import read_json

RATES = (1e-3, 3e-3, 9e-3)
SEEDS = (0, 1, 2)
FIRST = 500
"""Steps of a run's beginning whose gradients are told apart."""
SPIKE = 6.0
"""A step whose gradient is longer than the median by so many median deviations is a spike."""
LAST = 20
"""Steps at the end of a run whose mean is its training loss."""
TIMES: Mapping[str, Sequence[str]] = {
    "training 1M": ("heliostat.bench.attention_time", "1M", "--repeats", "61"),
    "training 25M": ("heliostat.bench.attention_time", "25M", "--repeats", "15"),
    "decode 24M": ("heliostat.bench.decode_kinds", "24M"),
    "decode 100M": ("heliostat.bench.decode_kinds", "100M"),
}
"""What is timed, each in a process of its own: its words behind ``python -m``."""


def search(kind: str, *, steps: int, size: str) -> list[AttentionTrial]:
    """The learning-rate trials of a kind."""
    return [
        AttentionTrial(kind=kind, learning_rate=rate, seed=SEEDS[0], steps=steps, size=size) for rate in RATES
    ]


def best(folder: Path, trials: Sequence[AttentionTrial]) -> AttentionTrial:
    """The trial with the lowest loss on the texts that are chosen by; of equals the smaller rate."""
    return min(trials, key=lambda t: (read_json(kept_at(folder, t))["choose"], t.learning_rate))


def run_all(
    folder: Path, trials: Sequence[AttentionTrial], *, workers: int, device: str, console: Console
) -> None:
    """Run the trials that are missing, ``workers`` at a time."""
    waiting = {t.name: _words(folder, t, device) for t in trials if not kept_at(folder, t).exists()}
    run_modules(waiting, logs=folder / "logs", workers=workers, console=console)


def _words(folder: Path, trial: AttentionTrial, device: str) -> list[str]:
    words = ["heliostat.bench.trial_attention", "--folder", str(folder), "--device", device]
    words += ["--kind", trial.kind, "--size", trial.size, "--learning-rate", f"{trial.learning_rate:g}"]
    return [*words, "--seed", str(trial.seed), "--steps", str(trial.steps)]


def chosen(folder: Path, *, steps: int, size: str) -> dict[str, AttentionTrial]:
    """The best trial of each kind, of the rates that are tried; kinds without a trial are left out."""
    tried = {kind: there(folder, search(kind, steps=steps, size=size)) for kind in KINDS}
    return {kind: best(folder, trials) for kind, trials in tried.items() if trials}


def there(folder: Path, trials: Sequence[AttentionTrial]) -> list[AttentionTrial]:
    """Those that are done."""
    return [trial for trial in trials if kept_at(folder, trial).exists()]


def seeds_of(trial: AttentionTrial) -> list[AttentionTrial]:
    """The same with every seed."""
    return [
        AttentionTrial(
            kind=trial.kind, learning_rate=trial.learning_rate, seed=seed, steps=trial.steps, size=trial.size
        )
        for seed in SEEDS
    ]


def table(folder: Path, *, steps: int, size: str) -> dict[str, Any]:
    """What was found by kind, of the trials that are there."""
    rows = {}
    for kind, trial in chosen(folder, steps=steps, size=size).items():
        kept = [read_json(kept_at(folder, t)) for t in there(folder, seeds_of(trial))]
        tried = there(folder, search(kind, steps=steps, size=size))
        rows[kind] = {
            "learning_rate": trial.learning_rate,
            "tried": {f"{t.learning_rate:g}": read_json(kept_at(folder, t))["choose"] for t in tried},
            "parameters": kept[0]["parameters"],
            "tokens": kept[0]["tokens"],
            "training": [statistics.mean(one["loss"][-LAST:]) for one in kept],
            "report": [one["report"] for one in kept],
            "gradient": {
                "first": _averaged([gradient(one["grad_norm"][:FIRST]) for one in kept]),
                "all": _averaged([gradient(one["grad_norm"]) for one in kept]),
            },
            "means": _averaged([one["means"] for one in kept]),
            "heads": kept[0]["heads"],
            "pictures": kept[0]["pictures"],
            "curve": _thinned(kept[0]["loss"]),
            "norms": _thinned(kept[0]["grad_norm"]),
            "seconds": [one["seconds"] for one in kept],
        }
    return rows


def gradient(norms: Sequence[float]) -> dict[str, float]:
    """Mean, spread and spikes of gradient norms; none may be missing."""
    middle = statistics.median(norms)
    apart = statistics.median(abs(norm - middle) for norm in norms)
    return {
        "mean": statistics.mean(norms),
        "std": statistics.pstdev(norms),
        "variance": statistics.pvariance(norms),
        "spikes": sum(norm > middle + SPIKE * apart for norm in norms),
        "steps": len(norms),
    }


def _averaged(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each number's mean over seeds."""
    return {name: statistics.mean(one[name] for one in found) for name in found[0]}


def _thinned(values: Sequence[float], points: int = 80) -> list[list[float]]:
    """Means of equal stretches, as (step, mean): a picture needs no more."""
    size = max(1, -(-len(values) // points))
    parts = [(start + size / 2, values[start : start + size]) for start in range(0, len(values), size)]
    return [[place, round(statistics.mean(part), 4)] for place, part in parts]


def times(folder: Path) -> dict[str, Any]:
    """What was timed, by name; a log may begin with a warning."""
    found = {}
    for name in TIMES:
        log = folder / "logs" / f"{_log(name)}.log"
        said = log.read_text(encoding="utf-8") if log.exists() else ""
        if "{" in said:
            found[name] = json.loads(said[said.index("{") :])
            found[name].pop("command", None)  # the page's own says how
    return found


def _log(name: str) -> str:
    return f"time-{name.replace(' ', '-')}"


def main(words: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="a raw wikitext file to learn from")
    parser.add_argument(
        "--validation", type=Path, required=True, help="another, to choose rates by and to report on"
    )
    parser.add_argument("--out", type=Path, default=Path("out/attention"), help="texts, trials, logs")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), help="table and pictures")
    parser.add_argument("--size", choices=SIZES, default="1M", help="90M is meant for a GPU")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=1, help="trials at once, one thread each")
    parser.add_argument("--device", default="auto", help="where trials train")
    parser.add_argument("--only", choices=("trials", "times"), help="run only these, then write the page")
    parser.add_argument("--no-run", action="store_true", help="write the page of what is there")
    given = parser.parse_args(words)
    console, of = Console(stderr=True), {"steps": given.steps, "size": given.size}
    if not given.no_run and given.only != "times":
        write_text(given.out / "text", given.train, given.validation)
        tokenizer_at(given.out, given.size)
        how: dict[str, Any] = {"workers": given.workers, "device": given.device, "console": console}
        run_all(given.out, [t for kind in KINDS for t in search(kind, **of)], **how)
        found = chosen(given.out, **of)
        run_all(given.out, [t for trial in found.values() for t in seeds_of(trial)], **how)
    if not given.no_run and given.only != "trials":
        missing = {_log(name): words for name, words in TIMES.items() if name not in times(given.out)}
        run_modules(missing, logs=given.out / "logs", workers=1, console=console)
    command = "python -m heliostat.bench.attention --train wiki.test.raw --validation wiki.valid.raw"
    command += f" --size {given.size} --steps {given.steps}"
    wanted = len(KINDS) * (len(RATES) + len(SEEDS) - 1)
    birth = certificate(
        command, seeds=list(SEEDS), wanted=wanted, texts=[given.train.name, given.validation.name], **of
    )
    print(write(given.docs, table(given.out, **of), times(given.out), birth))


if __name__ == "__main__":
    main()
