"""The page of ``heliostat bench speculate``: tables, pictures, verdicts; its numbers lie beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from heliostat.bench.speculated import Ruled, judge_share, ruled, speeds_of, verdicts
from heliostat.files import atomic_write_text
from heliostat.plot import lines

PAGE = "selfjudge"


def write_page(found: Mapping[str, Any], folder: Path, name: str = PAGE) -> Path:
    """The page of that name, its numbers and its two pictures; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rules = ruled(found)
    summary = {one.rule: asdict(one) for one in rules}
    atomic_write_text(folder / f"{name}.json", json.dumps({**found, "summary": summary}, indent=1) + "\n")
    atomic_write_text(folder / f"{name}-speed.svg", curve(rules))
    atomic_write_text(folder / f"{name}-theta.svg", swept(rules))
    atomic_write_text(folder / f"{name}.md", page(found, rules, name))
    return folder / f"{name}.md"


def page(found: Mapping[str, Any], rules: Sequence[Ruled], name: str = PAGE) -> str:
    """The page as Markdown."""
    facts = found["facts"]
    parts = [
        *_preface(found, rules),
        "## Answers",
        "",
        "Up to 8 tokens are drafted whatever it costs. *Length*: tokens for each pass of the speaker. *Taken*: share of "
        "all tokens that the speaker would not have said itself. Judged rules by name: mean over judges of several "
        "seeds, and how far they lie apart.",
        "",
        *_answers(rules),
        "",
        "## Speed",
        "",
        "Tokens a second end to end, with as many tokens drafted as the engine finds worth it; behind it, times "
        "`lossless` in the same turn.",
        "",
        *_speeds(rules),
        "",
        _cost(rules),
        "",
        *_switch(found),
        f"![accuracy over tokens a second]({name}-speed.svg)",
        "",
        f"Judging takes {1e6 * found['points']['judge_seconds']['8']:.0f} microseconds for 8 tokens: "
        f"{100 * judge_share(found):.2f} % of the time at batch {facts['batches'][0]}, if every pass had drafts.",
        "",
        "## Judges",
        "",
        *_judges(found),
        "",
        f"![accuracy and length over theta]({name}-theta.svg)",
        "",
        "## Other labels",
        "",
        "N: tokens that a score looks at. By result: a token is acceptable where the speaker, going on from it, comes to "
        "the same number (as in AutoJudge, arXiv 2504.20039).",
        "",
        *_suffixes(found),
        "",
        "## One judge for several members",
        "",
        "Judges of each row's prompts, on held-out tokens of every row with the same speaker; theta is the judge's own "
        "(`recall`).",
        "",
        *_transfer(found),
        "",
    ]
    return "\n".join(parts)


def _preface(found: Mapping[str, Any], rules: Sequence[Ruled]) -> list[str]:
    facts, birth = found["facts"], found["points"]["birth"]
    sizes = ", ".join(f"{name} {count:,}" for name, count in facts["parameters"].items())
    items = found["points"]["answers/0/off/told"]["items"]
    return [
        "# Rules for drafted tokens, side by side",
        "",
        *(f"- {line}" for line in verdicts(rules)),
        "",
        f"Parameters: {sizes}. {items} test prompts whose facts nobody was trained on, graded on the final result; those "
        "`held out` are also told in ways nobody was trained on. Greedy answers. What was measured, and what it is "
        "worth: [the method](../methods/selfjudge.md).",
        "",
        f"`{birth['command']}`; {birth['hardware']}, torch threads: {birth['threads']}; commit {birth['commit']}; "
        f"{birth['date']}; medians of {facts['repeats']} turns of {facts['calls']} prompts, all rules in each turn.",
        "",
    ]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    return [_row(heads), _row(["---"] * len(heads)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def _answers(rules: Sequence[Ruled]) -> list[str]:
    sets = list(rules[0].accuracy)
    heads = ["rule", *(f"right, {name}" for name in sets), "length", "drafted tokens accepted", "taken"]
    rows = []
    for one in rules:
        rights = [_percent(one.accuracy[name]) for name in sets]
        if one.spread:
            rights[0] += f" ({_percent(one.spread)} apart)"
        drafts = (
            ["–", "–", "–"]
            if one.rule == "off"
            else [f"{one.accepted_length:.2f}", _percent(one.accepted), _percent(one.judged)]
        )
        rows.append([f"`{one.rule}`", *rights, *drafts])
    return table(heads, rows)


def _cost(rules: Sequence[Ruled]) -> str:
    """What a step takes: where that is little, there is little to save."""
    batch = min(rules[0].speed)
    step = 1000 * batch / next(one for one in rules if one.rule == "off").speed[batch]
    return (
        f"Without drafts a step takes {step:.2f} ms at batch {batch}, all of scheduling and text included. Drafts save "
        "passes of the speaker and add passes of the draft, so they pay where a pass of the speaker costs much more than "
        "one of the draft."
    )


def _switch(found: Mapping[str, Any]) -> list[str]:
    """What it is worth to measure how much to draft."""
    worth = {batch: own.switch for batch, own in speeds_of(found).items()}
    told = ", ".join(f"{ratio:.2f} at batch {batch}" for batch, ratio in worth.items() if ratio is not None)
    return [
        f"Against always drafting 8, the engine's own choice gives `lossless` times the speed: {told}.",
        "",
    ] * bool(told)


def _speeds(rules: Sequence[Ruled]) -> list[str]:
    batches = list(rules[0].speed)
    heads = ["rule", *(f"batch {batch}" for batch in batches), f"drafted a token, batch {batches[0]}"]
    rows = [
        [
            f"`{one.rule}`",
            *(f"{one.speed[batch]:,.0f} ({one.over_lossless[batch]:.2f})" for batch in batches),
            f"{one.drafting[batches[0]]:.2f}",
        ]
        for one in rules
    ]
    return table(heads, rows)


def _judges(found: Mapping[str, Any]) -> list[str]:
    points, rows = found["points"], []
    for seed in range(found["facts"]["seeds"]):
        one = points[f"judge/{seed}"]
        r, f = one["points"]["recall"], one["points"]["f1"]
        rows.append(
            [
                str(seed),
                f"{sum(one['tokens']):,}",
                f"{one['tau']:.2f} ({one['known']:,} known)",
                _percent(one["acceptable"]),
                f"{one['auc']:.3f}",
                f"{r['theta']:.3f}: {_percent(r['accepted'])}, {_percent(r['recall'])}",
                f"{f['theta']:.3f}: {_percent(f['accepted'])}, {_percent(f['recall'])}",
            ]
        )
    heads = ["seed", "tokens", "tau", "acceptable", "AUC", "theta by recall: takes, rejects", "theta by F1"]
    return table(heads, rows)


def _suffixes(found: Mapping[str, Any]) -> list[str]:
    points, rows = found["points"], []
    labels = {f"N {suffix}": f"suffix/{suffix}" for suffix in found["facts"]["suffixes"]}
    for label, name in (labels | {"by result": "by_result"}).items():
        if name not in points:
            continue
        one = points[name]
        cells = [
            label,
            "–" if name == "by_result" else f"{one['tau']:.2f}",
            _percent(one["acceptable"]),
            f"{one['auc']:.3f}",
        ]
        for rule in ("judged:recall", "judged:f1"):
            answers = one["answers"][rule]
            cells.append(f"{_percent(answers['accuracy'])}, {answers['accepted_length']:.2f}")
        rows.append(cells)
    return table(["labels", "tau", "acceptable", "AUC", "by recall: right, length", "by F1"], rows)


def _transfer(found: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            "–" if one["auc"] is None else f"{one['auc']:.3f}",
            _percent(one["accepted"]),
            _percent(one["recall"]),
            _percent(one["precision"]),
            f"{one['tokens']:,}",
        ]
        for name, one in found["points"]["transfer"].items()
    ]
    heads = [
        "judge of -> tokens of",
        "AUC",
        "accepts",
        "rejects of the unacceptable",
        "right when it accepts",
        "tokens",
    ]
    return table(heads, rows)


def curve(rules: Sequence[Ruled]) -> str:
    """Accuracy over tokens a second at the smallest batch, a line a kind of rule."""
    batch = min(rules[0].speed)
    kinds: dict[str, list[tuple[float, float]]] = {}
    for one in rules:
        kinds.setdefault(one.rule.partition(":")[0], []).append(
            (one.speed[batch], 100 * one.accuracy["told"])
        )
    series = {kind: sorted(points) for kind, points in kinds.items()}
    return lines(series, title=f"Right answers over speed, batch {batch}", x="tokens a second", y="right, %")


def swept(rules: Sequence[Ruled]) -> str:
    """Accepted length, and dashed the accuracy, over theta; lossless stands at 1."""
    at = [(_theta(one.rule), one) for one in rules]
    points = sorted(((t, one) for t, one in at if t is not None), key=lambda point: point[0])
    return lines(
        {"tokens a pass": [(theta, one.accepted_length) for theta, one in points]},
        title="Judged at theta (1: lossless)",
        x="theta",
        y="tokens a pass of the speaker",
        y_from_zero=True,
        shares={"right answers": [(theta, one.accuracy["told"]) for theta, one in points]},
    )


def _theta(rule: str) -> float | None:
    kind, _, value = rule.partition(":")
    if rule == "lossless":
        return 1.0
    return float(value) if kind == "judged" and value.replace(".", "").isdigit() else None
