"""A comparison as pages: tables and curves in report.html, and the same in Markdown for docs/results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from heliostat.bench.compared import paper, told_systems
from heliostat.bench.measured_page import told
from heliostat.bench.report import footer, page, table
from heliostat.files import atomic_write_text
from heliostat.plot import bars, lines

Found = Mapping[str, Any]
Cells = tuple[list[str], list[list[str]]]
"""Heads and rows of a table."""
PEAKS = (
    "A *peak* is the throughput of sessions that are all due at once, with as many in flight as served this system best; "
    "the ratio is the median over rounds made in turns. The *ceiling* is arithmetic: the baseline's own seconds, less the "
    "prompt tokens that need not run if every page is kept; cheaper or dearer decoding is not in it, so a ratio may lie "
    "above it. *Prompt tokens run* are parts of the baseline's, in brackets the fewest possible."
)
CAPPED = (
    "Sessions a second by how many are in flight at most. What a system loses beyond its best is what it does "
    "past saturation, when the pool does not hold all that are in flight."
)
LOADS = (
    "Loads are parts of the baseline's peak. Sessions arrive at random and are the same for all systems. A 95th "
    "percentile needs 200 sessions and a queue that does not grow; *shorter* says how many times as long the baseline's "
    "sessions take. Where a queue grows there is none: it would tell how long was measured."
)


def write_report(path: Path, results: Found) -> Path:
    """The page of a results.json; returns its path."""
    parts = [f'<p class="wrong">{escape(line)}</p>' for line in warnings(results)]
    for found in results["comparisons"]:
        parts += _comparison(found)
    parts += [*over_members(results).values(), footer(results["birth"])]
    atomic_write_text(path, page(f"heliostat bench: {results['what']}", parts))
    return path


def _comparison(found: Found) -> list[str]:
    return [
        f"<h2>{found['members']} members</h2>",
        f"<p>{escape(setting(found))}</p>",
        *([f"<p>{_plainly(PEAKS)}</p>", table(*peak_cells(found))] if found["peaks"] else []),
        *([f"<p>{_plainly(CAPPED)}</p>", table(*cap_cells(found))] if found["peaks"] else []),
        *([f"<p>{_plainly(LOADS)}</p>", table(*load_cells(found))] if found["loads"] else []),
        *pictures(found).values(),
    ]


def _plainly(text: str) -> str:
    return escape(text).replace("*", "")


def warnings(results: Found) -> list[str]:
    """What a reader must know before believing a number."""
    found = ["stopped early: points that are missing were not measured"] if results["stopped"] else []
    for each in results["comparisons"]:
        for load in each["loads"]:
            for name, point in load["systems"].items():
                where = f"{each['members']} members, {name}, {load['load']:g} of the peak"
                if point["summary"]["queue"]["grows"]:
                    found.append(f"{where}: the queue grows, {point['summary']['queue']['why']}")
                if (share := client_share(point["shares"])) > 0.1:
                    found.append(f"{where}: the client took {share:.0%} of the time between steps")
    return found


def client_share(shares: Mapping[str, float]) -> float:
    """Of the time in which anything was asked."""
    return shares["client"] / max(1e-9, sum(shares.values()) - shares["idle"])


def setting(found: Found) -> str:
    """What was set beside each other, and how."""
    load, lengths = found["load"], found["load"]["lengths"]
    sizes = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in found["weights_bytes"].items())
    return (
        f"{load['workflow']}, {load['turns']} rounds; members by {load['assignment']}, switching {load['switch']:g}, "
        f"popularity {load['popularity']:g}; roles {load['role_place']}; context {lengths['context']}, role "
        f"{lengths['role']}, answer {lengths['answer']}, observation {lengths['observation']} tokens; tools "
        f"{load['pause']:g} s. Random weights of shape {found['shape']}, one engine, same cores, {found['pages']} pages "
        f"({found['pool']}) for each system. {told_systems(found['systems'])}. Adapters have rank "
        f"{found['adapter_rank']}. Weights: {sizes}. Goodput: first token within {found['limits']['ttft']:g} s, "
        f"{found['limits']['tpot']:g} s a token."
    )


def peak_cells(found: Found) -> Cells:
    """The table of peaks."""
    heads = [
        "setting",
        "system",
        "in flight",
        "sessions/s",
        "times the baseline",
        "ceiling",
        "prompt tokens run",
        "hits (most)",
        "paper",
    ]
    rows = []
    for part in found["peaks"]:
        base = next(iter(part["systems"].values()))
        for number, (name, own) in enumerate(part["systems"].items()):
            said = paper(name, found["load"], found["members"]) if not part["variant"] else None
            fewer = f"1/{base['prefill_rows_a_session'] / own['prefill_rows_a_session']:.2f}"
            rows.append(
                [
                    part["variant"] or "as fixed",
                    name,
                    str(own["cap"]),
                    f"{own['median']:.2f}",
                    "1" if not number else times(own["ratio"]),
                    "" if not number else f"{own['ceiling']['throughput']:.2f}x",
                    "1" if not number else f"{fewer} (1/{own['ceiling']['prefill']:.2f})",
                    f"{100 * own['hit_ratio']:.0f} % ({100 * own['most_hits']:.0f} %)",
                    f"{said.throughput} ({said.setting})" if said else "",
                ]
            )
    return heads, rows


def cap_cells(found: Found) -> Cells:
    """The table of sessions in flight."""
    caps = list(dict.fromkeys(cap for own in found["caps"].values() for cap in own))
    rows = [
        [name, *(f"{own[cap]:.2f}" if cap in own else "" for cap in caps)]
        for name, own in found["caps"].items()
    ]
    return ["in flight", *caps], rows


def times(estimate: Found) -> str:
    """A ratio with its interval, or why there is none."""
    if "value" not in estimate:
        return str(estimate["why_not"])
    span = f" [{estimate['low']:.2f}, {estimate['high']:.2f}]" if "low" in estimate else ""
    return f"{estimate['value']:.2f}x{span}"


def load_cells(found: Found) -> Cells:
    """The table of loads: goodput first."""
    heads = [
        "load",
        "system",
        "in flight",
        "goodput",
        "sessions/s",
        "session p50",
        "session p95",
        "p50 shorter",
        "p95 shorter",
        "TPOT p50",
        "hits",
        "paper's p95",
    ]
    rows = []
    for part in found["loads"]:
        for number, (name, point) in enumerate(part["systems"].items()):
            own = point["summary"]
            said = paper(name, found["load"], found["members"]) if part["load"] == 1 else None
            ratios = [times(point.get(f"p{q}_ratio", {"why_not": "no baseline"})) for q in (50, 95)]
            rows.append(
                [
                    f"{part['load']:g} ({part['rate']:.2f}/s)",
                    name,
                    str(point["cap"]),
                    told(own["goodput"]["share"], "%"),
                    f"{own['throughput']['sessions']:.2f}",
                    told(own["session"]["p50"], "s"),
                    told(own["session"]["p95"], "s"),
                    *(ratios if number else ("1", "1")),
                    told(own["tpot"]["p50"], "s", interval=False),
                    told(own["hits"]["ratio"], "%", interval=False),
                    f"{said.p95} ({said.setting})" if said else "",
                ]
            )
    return heads, rows


def pictures(found: Found) -> dict[str, str]:
    """By name: what there is to be drawn."""
    made = {}
    if found["peaks"]:
        own = found["peaks"][0]["systems"]
        made["peaks"] = bars(
            {name: system["median"] for name, system in own.items()},
            title="most sessions a second",
            unit=f"sessions/s, {found['members']} members",
        )
        made |= {
            f"where-{name}": bars(
                {n: 100 * share for n, share in system["shares"].items()},
                title=f"{name}: where the machine's time goes at its peak",
                unit="%",
            )
            for name, system in own.items()
        }
    if not found["loads"]:
        return made
    goodput = _curves(found, lambda own: own["goodput"]["share"])
    made["goodput"] = _drawn(goodput, "share of requests within their limits", "goodput")
    for q in (50, 95):
        times = _curves(found, partial(_session, q))
        made[f"session-p{q}"] = _drawn(times, f"a session's seconds, p{q}", "seconds")
    made["latency"] = lines(
        {name: [(x, y) for x, y in points] for name, points in _latency(found).items()},
        title="a session's median seconds over throughput",
        x="sessions answered a second",
        y="seconds",
        y_from_zero=True,
    )
    made["hits"] = _drawn(
        _curves(found, lambda own: own["hits"]["ratio"]), "share of prompt tokens found in the cache", "hits"
    )
    made["tpot"] = _tpot(found)
    made |= _phases(found)
    return made


def over_members(results: Found) -> dict[str, str]:
    """Peaks over the number of members, where several were measured."""
    parts = [
        (found["members"], found["peaks"][0]["systems"]) for found in results["comparisons"] if found["peaks"]
    ]
    if len(parts) < 2:
        return {}
    ratios = {
        name: [(members, own[name]["ratio"]) for members, own in parts if "value" in own[name]["ratio"]]
        for name in parts[0][1]
    }
    drawn = lines(
        {name: [(x, e["value"]) for x, e in points] for name, points in ratios.items()},
        title="most sessions a second, times the baseline",
        x="members",
        y="times",
        y_from_zero=True,
        intervals={
            name: [(x, e["low"], e["high"]) for x, e in points if "low" in e]
            for name, points in ratios.items()
        },
    )
    return {"members": drawn}


def _phases(found: Found) -> dict[str, str]:
    near = min(found["loads"], key=lambda part: abs(part["load"] - 0.8))
    return {
        f"phases-{name}": bars(
            point["summary"]["phases"]["mean"],
            title=f"{name}, {near['load']:g} of the peak: mean of a request",
            unit="s",
        )
        for name, point in near["systems"].items()
        if point["summary"]["phases"]["told"]
    }


def _session(q: int, own: Found) -> Found:
    seconds: Found = own["session"][f"p{q}"]
    return seconds


def _curves(found: Found, find: Callable[[Found], Found]) -> dict[str, list[tuple[float, Found]]]:
    """System -> (load, estimate), where there is one."""
    made: dict[str, list[tuple[float, Found]]] = {}
    for part in found["loads"]:
        for name, point in part["systems"].items():
            if "value" in (estimate := find(point["summary"])):
                made.setdefault(name, []).append((part["load"], estimate))
    return made


def _drawn(curves: Mapping[str, Sequence[tuple[float, Found]]], title: str, y: str) -> str:
    return lines(
        {name: [(x, e["value"]) for x, e in points] for name, points in curves.items()},
        title=title,
        x="load, in parts of the baseline's peak",
        y=y,
        y_from_zero=True,
        intervals={
            name: [(x, e["low"], e["high"]) for x, e in points if "low" in e]
            for name, points in curves.items()
        },
    )


def _latency(found: Found) -> dict[str, list[tuple[float, float]]]:
    made: dict[str, list[tuple[float, float]]] = {}
    for part in found["loads"]:
        for name, point in part["systems"].items():
            own = point["summary"]
            made.setdefault(name, []).append((own["throughput"]["sessions"], own["session"]["p50"]["value"]))
    return made


def _tpot(found: Found) -> str:
    part = found["loads"][-1]
    return lines(
        {
            name: [(x, y) for x, y in point["summary"]["tpot_steps"]]
            for name, point in part["systems"].items()
        },
        title=f"seconds a token at {part['load']:g} of the peak",
        x="seconds",
        y="share of requests up to it",
        y_from_zero=True,
    )


# ---- Markdown


def write_docs(folder: Path, name: str, results: Found) -> list[Path]:
    """``name``.md, .json and the pictures of the first comparison that has any loads, or of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / f"{name}.json", json.dumps(results, indent=1) + "\n")
    each = results["comparisons"]
    shown = next((found for found in each if found["loads"]), each[0]) if each else None
    made = {**(pictures(shown) if shown else {}), **over_members(results)}
    wanted = ("members", "peaks", "goodput", "session-p50", "hits")
    drawn = {f"{name}-{part}.svg": made[part] for part in wanted if part in made}
    for file, picture in drawn.items():
        atomic_write_text(folder / file, picture + "\n")
    atomic_write_text(folder / f"{name}.md", markdown(results, list(drawn)))
    return [folder / f"{name}.md", folder / f"{name}.json", *(folder / file for file in drawn)]


def markdown(results: Found, drawn: Sequence[str]) -> str:
    """The page for docs/results."""
    birth = results["birth"]
    parts = [
        f"# {results['what'][0].upper()}{results['what'][1:]}, side by side",
        born(birth),
        *(f"Note: {line}." for line in warnings(results)),
    ]
    for found in results["comparisons"]:
        parts += [f"## {found['members']} members", setting(found)]
        parts += [PEAKS, grid(peak_cells(found)), CAPPED, grid(cap_cells(found))] if found["peaks"] else []
        parts += [LOADS, grid(load_cells(found))] if found["loads"] else []
    parts += [f"![{file.removesuffix('.svg')}]({file})" for file in drawn]
    return "\n\n".join(parts) + "\n"


def born(birth: Found) -> str:
    """The birth certificate in one paragraph."""
    return (
        f"One machine, equal cores. `{birth['command']}`; {birth['hardware']}, {birth['threads']} threads; commit "
        f"{birth['commit']}; {birth['date']}; seed {birth['seed']}, {birth['repeats']} rounds."
    )


def grid(cells: Cells) -> str:
    """A table in Markdown."""
    heads, rows = cells
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))
