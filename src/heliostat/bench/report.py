"""Results as pages: one HTML file with inline pictures that opens without a server or a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from heliostat.files import atomic_write_text, readable_size
from heliostat.plot import bars, lines

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:860px;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #d9dee4;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}code{background:#f0f3f6;padding:0 .2rem;border-radius:3px}
.right{color:#2f8f5b}.wrong{color:#c23b56}footer{color:#5b6b7a;font-size:.85rem;margin-top:2rem}svg{max-width:100%;height:auto}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole HTML page around these parts."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """An HTML table of text cells; the columns in ``numbers`` stand to the right."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=n' if i in numbers else ''}>{escape(cell)}</td>" for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def write_demo_report(path: Path, results: Mapping[str, Any]) -> Path:
    """The demo's page; returns its path."""
    task, found = results["task"], results["lines"]
    accuracy = {line["name"]: 100 * line["accuracy"] for line in found}
    curves = {name: [(step, loss) for step, loss in points] for name, points in results["histories"].items()}
    weights = {name: sizes["weights"] / 2**20 for name, sizes in results["memory"].items()}
    rows = [
        [x["name"], f"{x['accuracy']:.1%}", "" if x["seconds"] is None else f"{x['seconds']:.0f}", x["note"]]
        for x in found
    ]
    sizes = [[n, readable_size(s["weights"]), readable_size(s["kv"])] for n, s in results["memory"].items()]
    parts = [
        f"<p>One base, one task (<b>{escape(task['name'])}</b>: {escape(task['what'])}; graded by "
        f"<code>{escape(task['metric'])}</code>), every sharing tuned for the same number of steps. A control is an "
        "ordinary fine-tune put into a shared row without being trained for it.</p>",
        "<h2>Right answers on held-out items</h2>",
        bars(accuracy, title="right answers", unit="%"),
        table(["", "right answers", "seconds", ""], rows, numbers=(1, 2)),
        "<h2>Learning</h2>",
        lines(curves, title="training loss", x="step", y="nats an answer token"),
        "<h2>Memory</h2>",
        bars(weights, title="weights in memory", unit="MiB"),
        table(["", "weights", "K,V of one prompt"], sizes, numbers=(1, 2)),
        "<h2>What they say</h2>",
        _samples(results["samples"]),
        footer(results["birth"], results["seconds"]),
    ]
    atomic_write_text(path, page("heliostat demo", parts))
    return path


def _samples(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    parts = []
    for place, item in enumerate(next(iter(samples.values()))[:3]):
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td class={'right' if said[place]['right'] else 'wrong'}>"
            f"<code>{escape(said[place]['answer'])}</code></td></tr>"
            for name, said in samples.items()
        )
        asked = f"<b>{escape(item['prompt'])}</b><br>wanted: <code>{escape(item['reference'])}</code>"
        parts.append(f"<p>{asked}</p><table>{rows}</table>")
    return "".join(parts)


def footer(birth: Mapping[str, Any], seconds: float | None = None) -> str:
    """The birth certificate of a page's numbers."""
    took = f" in {seconds:.0f} s" if seconds is not None else ""
    versions = ", ".join(f"{name} {number}" for name, number in birth["versions"].items())
    threads = "" if birth["threads"] is None else f", {birth['threads']} threads"
    where = f"{escape(birth['hardware'])}{threads}; commit {escape(birth['commit'])}"
    what = f"{escape(birth['date'])}; Python {escape(birth['python'])}, {escape(versions)}"
    return f"<footer><code>{escape(birth['command'])}</code>{took}; {where}; {what}</footer>"
