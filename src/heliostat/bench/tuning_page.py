"""The benchmark of tuners as people see it: tuning.md with tables, pictures and verdicts, and tuning.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from heliostat.bench.birth import certificate
from heliostat.bench.stepping import FROZEN, LORA, PACA, PEFT_LORA, Case
from heliostat.bench.tuning import MIB, Wish, kept_losses, measure
from heliostat.files import atomic_write_text
from heliostat.plot import bars, lines

CLOSE = 0.05
"""The goal for dropped branches: this near to the measured-term model."""


def page(found: Mapping[str, Any], wish: Wish, birth: Mapping[str, Any]) -> str:
    """The tables as a page."""
    config = wish.config
    parts = [
        "# Tuners: time, memory, loss",
        "",
        f"A Llama of chance, {config.parameters:,} parameters, {config.layers} layers of width {config.width}, vocabulary",
        f"{config.vocabulary}; steps of {wish.batch} x {wish.length} tokens, loss on the last {wish.spoken} of each row.",
        f"Medians of {birth['repeats']} steps, all cases in turn; speeds are medians of ratios within a turn. With one",
        "thread on a CPU, seconds are of the processor's time: a busy neighbour does not count. PEFT's",
        "adapters sit in the same model. What is kept for the backward pass is counted with saved_tensors_hooks, each",
        "storage once; the total adds weights, gradients and AdamW's moments. Longest: tokens of one row whose total",
        f"stays within {wish.budget_mib} MiB, reckoned from two measured lengths.",
        f"lora r {wish.r} and paca r {2 * wish.r} have about as many parameters, paca r {wish.r} has the rank.",
        f"{FROZEN}: one norm of the first block is tuned and nothing else, so that the gradient goes back through all",
        "weights: no adapter can be faster.",
        "",
        f"`{birth['command']}`; {birth['hardware']}, {birth['threads']} threads; commit {birth['commit']}; {birth['date']}; "
        + ", ".join(f"{k} {v}" for k, v in birth["versions"].items()),
        "",
        "How right the tuned models answer: [tuners](tuners.md).",
    ]
    for again in (False, True):
        rows = [row for row in found["rows"] if row["checkpointing"] is again]
        title = "Activations computed again (gradient checkpointing)" if again else "Activations kept"
        parts += ["", f"## {title}", "", *_table(rows)]
    parts += ["", "![step time](tuning-time.svg) ![kept](tuning-kept.svg)", ""]
    parts += ["## Dropped branches beside the model", "", *_model_table(found), ""]
    parts += ["![ratio](tuning-dropbp.svg)", "", "## Verdicts", "", *verdicts(found), ""]
    if found["losses"]:
        parts += [
            f"## Loss after {wish.loss_steps} steps",
            "",
            "The embedded base on `tools`, one seed, batch 32; rates by sensitivity after a tenth of the run.",
            "",
            "| | mean loss of the last 10 steps, nats a token |",
            "|---|---|",
            *(f"| {name} | {_last(curve):.3f} |" for name, curve in found["losses"].items()),
            "",
            "![loss](tuning-loss.svg)",
            "",
        ]
    return "\n".join(parts)


def _last(curve: Sequence[Sequence[float]]) -> float:
    return statistics.mean(loss for _, loss in curve[-10:])


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lora = next((row["case"] for row in rows if row["tuner"] == LORA and not row["dropbp"]), None)
    lines = [
        "| | trained | step, ms | speed, of lora | kept, MiB | total, MiB | longest, tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed = f"{row['speeds'][lora]:.2f}" if lora else ""
        spread = f"{row['low'] * 1e3:.0f} to {row['high'] * 1e3:.0f}"
        lines.append(
            f"| {row['case']} | {row['trained']:,} | {row['seconds'] * 1e3:.0f} ({spread}) | "
            f"{speed} | {row['kept'] / MIB:.1f} | {row['total'] / MIB:.1f} | "
            f"{row['longest']:,} |"
        )
    return lines


def _model_table(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "Of a step at rate 0: forward, backward, of it the branches', and clipping with the optimizer; and forward",
        "when nothing is kept. The model: only the branches' part shrinks with the rate. *Whole*: what else a dropped",
        "branch leaves out is counted, too: its forward pass keeps nothing (without gradients it runs on the kernels that",
        "serve), and its parameters have no gradients to clip or to step by.",
        "",
        "| | forward, ms | backward | branches | rest | forward, nothing kept |",
        "|---|---|---|---|---|---|",
    ]
    for name, parts in found["phases"].items():
        cells = [f"{1e3 * parts[key]:.0f}" for key in ("forward", "backward", "branches", "rest", "untaped")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| | measured time | model | apart | whole | apart |", "|---|---|---|---|---|---|"]
    for row in found["rows"]:
        if row["predicted"] is not None:
            cells = [
                f"{row[key]:.3f} | {row['ratio'] / row[key] - 1:+.1%}" for key in ("predicted", "reckoned")
            ]
            lines.append(f"| {row['case']} | {row['ratio']:.3f} | {' | '.join(cells)} |")
    return lines


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """The goals in words, with the numbers: met or not."""
    plain = {r["case"]: r for r in found["rows"] if not r["checkpointing"]}
    lines = []
    low_rank = [r for r in plain.values() if r["tuner"] in (LORA, PEFT_LORA) and not r["dropbp"]]
    columns = [r for r in plain.values() if r["tuner"] == PACA]
    if low_rank and columns:
        lora = min(low_rank, key=lambda r: r["seconds"])
        widest = max(r["r"] for r in columns)
        for row in columns:
            if row["dropbp"] not in (0.0, 0.5):
                continue
            equal = "equal parameters" if row["r"] == widest else "equal rank"
            lines.append(
                f"- {row['case']} ({equal}): {row['speeds'][lora['case']]:.2f} times the speed of the faster LoRA "
                f"({lora['case']}), kept {row['kept'] / lora['kept'] - 1:+.0%}, "
                f"total {row['total'] / lora['total'] - 1:+.0%}."
            )
        bound = plain.get(FROZEN)
        if bound is not None:
            lines.append(
                f"- The bound: frozen weights and no adapter at all take {bound['speeds'][lora['case']]:.2f} times the "
                f"speed of {lora['case']}; of what could be won, the columns of {widest} win "
                f"{_won(plain, lora['case'], widest):.0%}."
            )
    for key, name in (("predicted", "the model's time"), ("reckoned", "the time with all that is left out")):
        apart = [r["ratio"] / r[key] - 1 for r in plain.values() if r[key] is not None]
        if apart:
            lines.append(f"- Dropped branches: {_nearness(apart, name)}.")
    return lines


def _nearness(apart: Sequence[float], what: str) -> str:
    met = sum(abs(x) <= CLOSE for x in apart)
    return (
        f"{met} of {len(apart)} cases within {CLOSE:.0%} of {what}; {sum(x > CLOSE for x in apart)} slower, "
        f"{sum(x < -CLOSE for x in apart)} faster; from {min(apart):+.1%} to {max(apart):+.1%}"
    )


def _won(plain: Mapping[str, Mapping[str, Any]], lora: str, widest: int) -> float:
    """How much of the time that an adapter takes beside frozen weights the columns save, of the low-rank one's."""
    bound = 1 / plain[FROZEN]["speeds"][lora]
    columns = 1 / plain[Case(PACA, widest).name]["speeds"][lora]
    return (1 - columns) / (1 - bound)


def write(folder: Path, found: Mapping[str, Any], wish: Wish, birth: Mapping[str, Any]) -> Path:
    """tuning.json, tuning.md and the pictures in ``folder``; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"birth": birth, "wish": asdict(wish), **found}
    atomic_write_text(folder / "tuning.json", json.dumps(facts, indent=1) + "\n")
    plain = [row for row in found["rows"] if not row["checkpointing"]]
    speeds = {row["case"]: 1e3 * row["seconds"] for row in plain}
    edges = {row["case"]: (1e3 * row["low"], 1e3 * row["high"]) for row in plain}
    pictures = {
        "time": bars(speeds, title="A training step, least to most", unit="ms", intervals=edges),
        "kept": bars(
            {row["case"]: row["kept"] / MIB for row in plain}, title="Kept for the backward pass", unit="MiB"
        ),
        "dropbp": lines(
            _ratios(plain), title="Time of a step by drop rate", x="rate", y="of rate 0", y_from_zero=True
        ),
    }
    if found["losses"]:
        pictures["loss"] = lines(
            dict(list(found["losses"].items())[:12]), title="Training loss", x="step", y="nats a token"
        )
    for name, picture in pictures.items():
        atomic_write_text(folder / f"tuning-{name}.svg", picture)
    atomic_write_text(folder / "tuning.md", page(found, wish, birth))
    return folder / "tuning.md"


def _ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Measured and predicted ratios by rate, of every tuner that drops."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = Case(row["tuner"], row["r"]).name
        if any(r["dropbp"] and (r["tuner"], r["r"]) == (row["tuner"], row["r"]) for r in rows):
            series.setdefault(name, []).append((row["dropbp"], row["ratio"]))
            predicted = 1.0 if row["predicted"] is None else row["predicted"]
            series.setdefault(f"{name}, model", []).append((row["dropbp"], predicted))
    return series


def main(wish: Wish, out: Path, *, console: Console) -> tuple[dict[str, Any], Path]:
    """Measure what is wished and write the page; returns numbers and page."""
    curves = kept_losses(wish.checked(), out, console)
    found = {**measure(wish, console), "losses": curves}
    command = (
        f"heliostat bench train --tuners {','.join(wish.tuners)} --dropbp {','.join(f'{r:g}' for r in wish.rates)}"
        f" --r {wish.r} --hidden-size {wish.hidden_size} --layers {wish.layers} --batch {wish.batch}"
        f" --length {wish.length} --spoken {wish.spoken} --vocabulary {wish.vocabulary} --repeats {wish.repeats}"
        f" --loss-steps {wish.loss_steps} --budget-mib {wish.budget_mib} --device {wish.device}"
        f"{'' if wish.peft else ' --no-peft'}"
    )
    return found, write(out, found, wish, certificate(command, repeats=wish.repeats))
