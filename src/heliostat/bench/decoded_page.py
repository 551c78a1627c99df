"""Decoding side by side as pages: report.html, and Markdown for docs/results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from heliostat.bench.compared import told_systems
from heliostat.bench.compared_page import Cells, born, grid, times
from heliostat.bench.report import footer, page, table
from heliostat.files import atomic_write_text
from heliostat.plot import lines

Found = Mapping[str, Any]
GOAL: Mapping[int, float] = {4: 2.0, 8: 3.0}
"""Members -> times the baseline's tokens a second that one shared speaker should reach at equal cores."""
PAPER = (
    "SUN's paper has 2.0x the throughput of a decode GPU: four models of 8B on A100s, four decode workers against two at "
    "equal service, popularity by Zipf. Here all systems have the same cores: another kind of number."
)
HOW = (
    "Tokens a second over the steps in which every request gets a token; prompts are read before, by whoever writes them "
    "in that row. Medians over rounds made in turns, each in a fresh engine. No cap on requests would help the baseline: "
    "in every step it reads the weights of all members that are asked, however few run."
)


def write_report(path: Path, results: Found) -> Path:
    """The page of a results.json; returns its path."""
    stopped = ['<p class="wrong">Stopped early.</p>'] if results["stopped"] else []
    parts = [
        *stopped,
        f"<p>{escape(setting(results))}</p><p>{escape(HOW)}</p>",
        table(*cells(results)),
        f"<p>{escape(PAPER)}</p>",
        *pictures(results).values(),
        footer(results["birth"]),
    ]
    atomic_write_text(path, page(f"heliostat bench: {results['what']}", parts))
    return path


def setting(results: Found) -> str:
    """What was set beside each other."""
    sizes = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in results["weights_bytes"].items())
    return (
        f"Random weights of shape {results['shape']}, one engine, same cores. {told_systems(results['systems'])}. "
        f"Adapters have rank {results['adapter_rank']}. Weights of the largest case: {sizes}."
    )


def cells(results: Found) -> Cells:
    """The table: a row for each case and system."""
    heads = [
        "case",
        "requests",
        "system",
        "tokens/s",
        "times the baseline",
        "goal",
        "TPOT p50",
        "reading prompts",
    ]
    rows = []
    for found in results["cases"]:
        case = found["case"]
        for number, (name, own) in enumerate(found["systems"].items()):
            goal = GOAL.get(case["members"]) if name == "sun" and not case["less"] else None
            rows.append(
                [
                    case["name"] + (" (less to gain)" if case["less"] else ""),
                    "+".join(map(str, case["counts"])),
                    name,
                    f"{own['median']:.0f}",
                    times(own["ratio"]) if number else "1",
                    f"{goal:g}x" if goal else "",
                    f"{1000 * own['tpot']:.2f} ms",
                    f"{own['prefill']:.2f} s",
                ]
            )
    return heads, rows


def pictures(results: Found) -> dict[str, str]:
    """Ratios over running requests by popularity and members; one distribution of seconds a token."""
    made = {}
    plain = [found for found in results["cases"] if not found["case"]["less"]]
    for members, popularity in dict.fromkeys((f["case"]["members"], f["case"]["popularity"]) for f in plain):
        some = [
            found
            for found in plain
            if (found["case"]["members"], found["case"]["popularity"]) == (members, popularity)
        ]
        made[f"{members}-{popularity.replace(':', '')}"] = _ratios(
            some, f"{members} members, {popularity}: tokens/s"
        )
    if plain:
        made["tpot"] = _tpot(plain[-1])
    return made


def _ratios(some: Sequence[Found], title: str) -> str:
    names = list(some[0]["systems"])
    rated = [
        (found["case"]["running"], name, found["systems"][name]["ratio"]) for found in some for name in names
    ]
    return lines(
        {name: [(x, e["value"]) for x, n, e in rated if n == name and "value" in e] for name in names},
        title=f"{title}, times {names[0]}",
        x="running requests a member, on average",
        y="times",
        y_from_zero=True,
        intervals={
            name: [(x, e["low"], e["high"]) for x, n, e in rated if n == name and "low" in e]
            for name in names
        },
    )


def _tpot(found: Found) -> str:
    return lines(
        {name: [(x, y) for x, y in own["tpot_steps"]] for name, own in found["systems"].items()},
        title=f"seconds a token: {found['case']['name']}",
        x="seconds",
        y="share of steps up to it",
        y_from_zero=True,
    )


def write_docs(folder: Path, name: str, results: Found) -> list[Path]:
    """``name``.md, .json and pictures; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {f"{name}-{part}.svg": picture for part, picture in pictures(results).items()}
    files = {
        f"{name}.json": json.dumps(results, indent=1) + "\n",
        f"{name}.md": markdown(results, list(drawn)),
        **{file: picture + "\n" for file, picture in drawn.items()},
    }
    for file, text in files.items():
        atomic_write_text(folder / file, text)
    return [folder / file for file in files]


def markdown(results: Found, drawn: Sequence[str]) -> str:
    """The page for docs/results."""
    parts = [
        "# Decoding for several members, side by side",
        born(results["birth"]),
        setting(results),
        HOW,
        grid(cells(results)),
        PAPER,
        *(f"![{file.removesuffix('.svg')}]({file})" for file in drawn),
    ]
    return "\n\n".join(parts) + "\n"
