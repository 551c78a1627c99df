"""The comparison of attention kinds as a page: tables, pictures, verdicts in words. What is missing is said to be."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heliostat.files import atomic_write_text
from heliostat.plot import bars, lines, panels

PLAIN = "softmax"
VISIBLE, FIXED, CONTROL = "affine", "affine-fixed", "alpha-half"
GOAL = 1.05
"""Most that a step may cost, in steps of softmax."""
DARKEST = 0.5
NAMES: Mapping[str, str] = {
    "affine": "affine, n visible",
    "affine-fixed": "affine, n fixed (paper, inferred)",
    "alpha-half": "control: alpha 0.5 always, n visible",
}
"""As the tables say a kind; others by their name."""


def shown(kind: str) -> str:
    """A kind's name for people."""
    return NAMES.get(kind, kind)


def perplexities(row: Mapping[str, Any]) -> list[float]:
    """Of a kind on the report's texts, by seed."""
    return [math.exp(loss) for loss in row["report"]]


def page(rows: Mapping[str, Any], times: Mapping[str, Any], birth: Mapping[str, Any]) -> str:
    """Everything as Markdown."""
    there = sum(len(row["tried"]) + len(row["report"]) - 1 for row in rows.values())
    parts = ["# Kinds of attention, from scratch", ""]
    if there < birth["wanted"]:
        parts += [
            f"**Not complete: {there} of {birth['wanted']} trials are in these tables**, so kinds with fewer rates or",
            "seeds are not comparable with the others. The command below runs what is missing.",
            "",
        ]
    parts += [*_head(rows, birth), ""]
    if rows:
        parts += ["## Verdict, at this scale", "", *verdicts(rows, times), ""]
        parts += ["## Losses", "", *_losses(rows), "", "![loss](attention-loss.svg)", ""]
        parts += [
            "Learning rates tried, with their loss on the texts that are chosen by:",
            "",
            *_rates(rows),
            "",
        ]
        parts += ["## Gradients", "", *_gradients(rows), "", "![gradient](attention-gradient.svg)", ""]
        parts += ["## What heads look at", "", *_heads(rows), "", "![first](attention-first.svg)", ""]
        parts += ["![heads](attention-heads.svg)", ""]
    return "\n".join([*parts, "## What it costs", "", *_costs(times), ""])


def _head(rows: Mapping[str, Any], birth: Mapping[str, Any]) -> list[str]:
    first = next(iter(rows.values()), None)
    size = f"{first['parameters']:,} parameters, {first['tokens']:,} tokens" if first else "no trial is done"
    versions = ", ".join(f"{k} {v}" for k, v in birth["versions"].items())
    return [
        f"**This is small**: {size}, {birth['steps']} steps. The paper's models (arXiv 2602.23057) have 0.5 to 3 billion",
        "parameters, read 20 billion tokens and learn from a teacher; what is seen here need not hold there.",
        "",
        "Every kind begins with the same seeds and sees the same rows in the same order. The same learning rates are tried",
        "for all with seed 0 and chosen by loss on held-out texts; then all seeds are reported on other held-out texts,",
        "which no choice saw. Each model is judged as it is saved, in bfloat16's precision.",
        f"Text: {' and '.join(birth['texts'])} of wikitext-2 (raw; from Wikipedia, licence CC BY-SA), and the documentation",
        f"that Python {birth['python']} brings: docstrings, and topics of pydoc. Held out are the second file, and",
        "every eighth file of the documentation by a hash of its name. Byte-level BPE, trained on the rest.",
        "",
        f"`{birth['command']}`; {birth['hardware']}; commit {birth['commit']}; {birth['date']}; {versions}; "
        f"seeds {', '.join(map(str, birth['seeds']))}.",
    ]


def verdicts(rows: Mapping[str, Any], times: Mapping[str, Any]) -> list[str]:
    """What follows, in words, from the numbers alone."""
    found = []
    if PLAIN in rows:
        for kind in rows:
            if kind != PLAIN:
                found.append(f"- {shown(kind)} against softmax: {_against(rows[kind], rows[PLAIN])}.")
    if VISIBLE in rows and FIXED in rows:
        found.append(f"- n visible against n fixed: {_against(rows[VISIBLE], rows[FIXED])}.")
    if VISIBLE in rows and CONTROL in rows:
        found.append(f"- A learned alpha against 0.5 always: {_against(rows[VISIBLE], rows[CONTROL])}.")
    if PLAIN in rows:
        found.append(f"- Gradients: {_calmer(rows)}.")
    edges = [shown(k) for k, row in rows.items() if _at_edge(row)]
    if edges:
        found.append(
            f"- The best rate tried is the highest or lowest for {', '.join(edges)}: better ones may lie beyond."
        )
    return found + [_goal(name, _ratios(facts)) for name, facts in times.items()]


def _against(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Perplexity beside another's; whether seeds can tell."""
    own, other = perplexities(ours), perplexities(theirs)
    change = statistics.mean(own) / statistics.mean(other) - 1
    numbers = f"perplexity {statistics.mean(own):.2f} beside {statistics.mean(other):.2f} ({change:+.1%})"
    if min(len(own), len(other)) < 2:
        return f"{numbers}; one seed, so it may be chance"
    if max(own) < min(other):
        return f"{numbers}; lower with every seed than the other with any"
    if min(own) > max(other):
        return f"{numbers}; higher with every seed than the other with any"
    return f"{numbers}; seeds overlap, so it may be chance"


def _calmer(rows: Mapping[str, Any]) -> str:
    plain = rows[PLAIN]["gradient"]["first"]["variance"]
    told = [
        f"{shown(kind)} {row['gradient']['first']['variance'] / plain:.2f}"
        for kind, row in rows.items()
        if kind != PLAIN
    ]
    return "variance of the norm in softmax's, early steps: " + (", ".join(told) or "nothing to compare with")


def _at_edge(row: Mapping[str, Any]) -> bool:
    tried = sorted(map(float, row["tried"]))
    return len(tried) > 2 and row["learning_rate"] in (tried[0], tried[-1])


def _goal(name: str, ratios: Mapping[str, float]) -> str:
    others = {kind: ratio for kind, ratio in ratios.items() if not kind.startswith(PLAIN)}
    missed = [f"{kind} {ratio - 1:+.1%}" for kind, ratio in others.items() if ratio > GOAL]
    goal = f"at most {GOAL - 1:.0%} more than softmax"
    if not missed:
        return f"- Cost, {name}: {goal} is met by all."
    return f"- Cost, {name}: {goal} is **missed** by {', '.join(missed)}."


def _losses(rows: Mapping[str, Any]) -> list[str]:
    table = [
        "Perplexity: of the report's texts, mean over seeds, least and most. Training loss: mean of the last steps.",
        "",
        "| | rate | seeds | training loss, nats a token | perplexity | least to most |",
        "|---|---|---|---|---|---|",
    ]
    for kind, row in rows.items():
        said = perplexities(row)
        table.append(
            f"| {shown(kind)} | {row['learning_rate']:g} | {len(said)} | {statistics.mean(row['training']):.4f} | "
            f"{statistics.mean(said):.2f} | {min(said):.2f} to {max(said):.2f} |"
        )
    return table


def _rates(rows: Mapping[str, Any]) -> list[str]:
    rates = sorted({rate for row in rows.values() for rate in row["tried"]}, key=float)
    table = [f"| | {' | '.join(rates)} |", f"|---|{'---|' * len(rates)}"]
    for kind, row in rows.items():
        losses = " | ".join(
            f"{row['tried'][rate]:.4f}" if rate in row["tried"] else "not yet" for rate in rates
        )
        table.append(f"| {shown(kind)} | {losses} |")
    return table


def _gradients(rows: Mapping[str, Any]) -> list[str]:
    table = [
        "Norm of the gradient before it is clipped, every step, means over seeds. A spike is a step above the median by six "
        "median absolute deviations.",
        "The early steps are the first 500, or all where there are no more.",
        "",
        "| | steps | mean | std | variance | spikes |",
        "|---|---|---|---|---|---|",
    ]
    for kind, row in rows.items():
        for part, name in (("first", "early"), ("all", "all")):
            facts = row["gradient"][part]
            if part == "all" and facts == row["gradient"]["first"]:
                continue
            table.append(
                f"| {shown(kind)} | {name} {facts['steps']:.0f} | {facts['mean']:.3f} | {facts['std']:.3f} | "
                f"{facts['variance']:.4f} | {facts['spikes']:.1f} |"
            )
    return table


def _heads(rows: Mapping[str, Any]) -> list[str]:
    table = [
        "Whole documents' beginnings from the report's texts; queries from the 64th on; means over heads, layers and seeds.",
        "First token: its share of the softmax, and the weight with which its value is really added (scaled, with its share "
        "of the sum, gated).",
        "Weights: their sum. Entropy: of the softmax over tokens, nats.",
        "",
        "| | first token, softmax | first token, added | weights | entropy |",
        "|---|---|---|---|---|",
    ]
    for kind, row in rows.items():
        cells = " | ".join(f"{row['means'][name]:.4f}" for name in ("first", "read", "mass", "entropy"))
        table.append(f"| {shown(kind)} | {cells} |")
    table += [
        "",
        "The pictures: of each layer the head that reads the first token most, seed 0; queries downwards, keys to the",
        "right, the first 20 of each, mean over documents; blue adds values, orange takes them away.",
    ]
    return table


def _ratios(facts: Mapping[str, Any]) -> dict[str, float]:
    """Times of softmax's step, by kind; of a decode step by kind and batch."""
    if "steps" in facts:
        return {f"{row['kind']}, batch {row['batch']}": row["ratio"] for row in facts["steps"]}
    return {kind: row["ratio"] for kind, row in facts["kinds"].items()}


def _costs(times: Mapping[str, Any]) -> list[str]:
    if not times:
        return ["Not measured yet: the command above with `--only times`."]
    parts = [
        "Medians over turns: a step's time in that of softmax's step of the same turn; all kinds in every turn. Softmax",
        "again is softmax once more: as far from 1 as that is, the machine alone may be.",
    ]
    for name, facts in times.items():
        count = facts.get("repeats", facts.get("rounds"))
        commit = f", commit {facts['commit']}" if "commit" in facts else ""
        parts += ["", f"{name}, {count} turns{commit}:", "", "| | of softmax | step, ms |", "|---|---|---|"]
        seconds = (
            {f"{row['kind']}, batch {row['batch']}": row["seconds"] for row in facts["steps"]}
            if "steps" in facts
            else {kind: row["seconds"] for kind, row in facts["kinds"].items()}
        )
        parts += [
            f"| {shown(k)} | {ratio:.3f} | {1e3 * seconds[k]:.2f} |" for k, ratio in _ratios(facts).items()
        ]
    return parts


def write(folder: Path, rows: Mapping[str, Any], times: Mapping[str, Any], birth: Mapping[str, Any]) -> Path:
    """attention.json, attention.md and the pictures in ``folder``; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"birth": birth, "kinds": rows, "times": times}
    atomic_write_text(folder / "attention.json", json.dumps(facts) + "\n")
    if rows:
        for name, picture in _pictures(rows).items():
            atomic_write_text(folder / f"attention-{name}.svg", picture)
    atomic_write_text(folder / "attention.md", page(rows, times, birth))
    return folder / "attention.md"


def _pictures(rows: Mapping[str, Any]) -> dict[str, str]:
    added = {shown(kind): 100 * row["means"]["read"] for kind, row in rows.items()}
    return {
        "loss": _curves(rows, "curve", title="Training loss, seed 0", y="nats a token"),
        "gradient": _curves(rows, "norms", title="Norm of the gradient, seed 0", y="norm"),
        "first": bars(added, title="Weight of the first token's value", unit="%"),
        "heads": panels(
            {kind: row["pictures"][:4] for kind, row in rows.items()},
            title="Heads that read the first token most, by layer",
            most=DARKEST,
        ),
    }


def _curves(rows: Mapping[str, Any], name: str, *, title: str, y: str) -> str:
    series: dict[str, Sequence[tuple[float, float]]] = {
        k: [(a, b) for a, b in row[name]] for k, row in rows.items()
    }
    return lines(series, title=title, x="step", y=y)
