"""The page of ``heliostat bench kernels``: tables and a picture of what ``bench.kernels`` measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heliostat.bench.kernels import PEERS
from heliostat.files import atomic_write_text
from heliostat.plot import lines

Found = Mapping[str, Any]


def best_dense(shape: Found, batch: int) -> float:
    """Seconds of the fastest dense bf16 product."""
    return min(shape["dense"][name][batch] for name in shape["dense"] if name.endswith("bf16"))


def page(found: Found, birth: Found) -> str:
    """The results as Markdown."""
    head = [
        "# Products with weights in codebooks",
        "",
        "Microseconds of one product; in brackets how many times as fast as the best dense bf16 product of the same run.",
        f"{found['plan']['bytes'] >> 20} MiB of weights and more taken in turn (fewer of ours beyond batch 4); medians of "
        f"{found['plan']['repeats']}.",
        "*As it serves* looks codes up in two planes for few rows and reads a dense copy for more.",
        f"Memory is read at {found['reading'] / 1e9:.1f} GB/s here; *memory* is the time of reading a weight's bytes so.",
        "",
        f"`{birth['command']}`; {birth['hardware']}; {birth['threads']} threads; commit {birth['commit']}; {birth['date']}",
        *_busy(birth),
    ]
    for name, shape in found["shapes"].items():
        head += ["", f"## {name}", "", *_table(shape, found)]
    missing = [
        f"{name} ({variable} is not set)" for name, variable in PEERS.items() if name not in found["peers"]
    ]
    missing += [
        f"{m}x{k} (the time was over)"
        for m, k in found["plan"]["shapes"]
        if f"{m}x{k}" not in found["shapes"]
    ]
    if missing:
        head += ["", f"Not measured: {', '.join(missing)}."]
    for name, answers in found["peers"].items():
        head += ["", f"## Beside {name}", "", *_peer(answers, found)]
    return "\n".join([*head, ""])


def _busy(birth: Found) -> list[str]:
    """What must be said where other programs ran: then times are too long, and ratios are scattered."""
    load, threads = birth.get("load", 0), birth["threads"]
    if load <= threads + 0.5:
        return []
    told = f"**The machine was not alone with this: a load of {load:.1f} on {threads} threads over the last five minutes.**"
    return ["", told, "Times are too long and ratios scatter widely; no goal is judged by them."]


def _table(shape: Found, found: Found) -> list[str]:
    batches = found["plan"]["batches"]
    rows = [
        _row(["", *(f"batch {b}" for b in batches), "error", "batch 1 / memory"]),
        _row(["---"] * (len(batches) + 3)),
    ]
    for name, own in shape["dense"].items():
        rows.append(_row([name, *(f"{1e6 * own[b]:.0f}" for b in batches), "", ""]))
    for name, own in shape["coded"].items():
        memory = own["bytes"] / found["reading"]
        for planes in ("1", "2"):
            cells = [_against(own[planes][b], best_dense(shape, b)) for b in batches]
            ratio = f"{own[planes][batches[0]] / memory:.2f}x"
            rows.append(_row([f"{name}, planes: {planes}", *cells, f"{own[f'error {planes}']:.2%}", ratio]))
        cells = [_against(_chosen(shape, own, b), best_dense(shape, b)) for b in batches]
        rows.append(_row([f"{name}, as it serves", *cells, "", ""]))
    return rows


def _chosen(shape: Found, own: Found, batch: int) -> float:
    """Seconds of what the dispatcher takes: two planes up to so many rows, then a dense copy."""
    serves = "heliostat bf16" if "heliostat bf16" in shape["dense"] else "torch bf16"
    return float(own["2"][batch] if batch <= own["rows"] else shape["dense"][serves][batch])


def _against(seconds: float, dense: float) -> str:
    return f"{1e6 * seconds:.0f} ({dense / seconds:.2f}x)"


def _peer(answers: Found, found: Found) -> list[str]:
    rows = [
        _row(["their kernel", "shape", "batch", "theirs", "m1v4g128, two planes", "ours is"]),
        _row(["---"] * 6),
    ]
    for key, seconds in answers.items():
        kind, shape, batch = key.split()
        own = found["shapes"].get(shape, {}).get("coded", {}).get("m1v4g128")
        if own is None:
            continue
        ours = own["2"][int(batch)]
        cells = [kind, shape, batch, f"{1e6 * seconds:.0f}", f"{1e6 * ours:.0f}", f"{seconds / ours:.2f}x"]
        rows.append(_row(cells))
    return rows


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def picture(found: Found) -> str:
    """Speed beside dense over the batch, two planes, for the first shape."""
    name, shape = next(iter(found["shapes"].items()))
    series = {
        format: [(float(b), best_dense(shape, b) / own["2"][b]) for b in found["plan"]["batches"]]
        for format, own in shape["coded"].items()
    }
    return lines(series, title=f"{name}: times as fast as dense bf16", x="rows", y="times", y_from_zero=True)


def write(found: Found, birth: Found, out: Path) -> None:
    """codegemm.md, .json and .svg in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / "codegemm.json", json.dumps({"birth": birth, "found": found}, indent=1) + "\n")
    atomic_write_text(out / "codegemm.md", page(found, birth))
    atomic_write_text(out / "codegemm.svg", picture(found))
