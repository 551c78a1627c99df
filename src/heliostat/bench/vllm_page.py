"""From the points of ``vllm_table`` to its rows, its page and its picture. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from heliostat.bench.compared import latency_ratio
from heliostat.bench.measured_page import told
from heliostat.bench.statistics import percentile
from heliostat.plot import bars

Found = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class System:
    """What is set beside the others."""

    kind: str
    """Of its members, as ``gpu_vllm`` names them, or ``whole``."""
    told: str
    short: str


SYSTEMS: Mapping[str, System] = {
    "separate": System("whole", "a vLLM server for each member, each a whole model", "separate"),
    "adapters": System("adapted", "one vLLM server, an adapter for each member", "multi-LoRA"),
    "icarus": System("streamed", "the family on one vLLM server, in two streams (`icarus`)", "icarus"),
    "prefillshare": System(
        "spoken", "one server reads for all, another answers with adapters (`prefillshare`)", "prefillshare"
    ),
    "sun": System("handed", "one server reads with adapters, another answers for all (`sun`)", "sun"),
}
"""The first is what the others are compared with."""


def rows_of(points: Mapping[str, Found]) -> list[dict[str, Any]]:
    """One row a system, of all its points; a system without a point has none."""
    pooled = {name: pool(name, points) for name in SYSTEMS}
    first = pooled[next(iter(SYSTEMS))]
    return [_row(name, one, first) for name, one in pooled.items() if one is not None]


def pool(system: str, points: Mapping[str, Found]) -> dict[str, Any] | None:
    """All that was measured of a system as one point, in the form that ``compared`` reads."""
    mine = {name: point for name, point in points.items() if name.rpartition("-")[0] == system}
    if not mine:
        return None
    spans = {
        f"{name.rpartition('-')[2]}/{session}": (one["start"], one["end"])
        for name, point in mine.items()
        for session, one in point["sessions"].items()
        if one["answered"]
    }
    runs = [run for point in mine.values() for run in point["runs"]]
    grows = any(run["queue"]["grows"] for run in runs)
    samples = [(number, end - start) for number, (start, end) in enumerate(spans.values())]
    session = {f"p{q}": percentile(samples, q, grows=grows).to_json() for q in (50, 95)}
    return {
        "memory": [point["memory_mib"] for point in mine.values()],
        "runs": runs,
        "spans": spans,
        "others": [point["others"] for point in mine.values()],
        "failed": sum(not one["answered"] for point in mine.values() for one in point["sessions"].values()),
        "summary": {"queue": {"grows": grows}, "session": session},
    }


def _row(system: str, mine: Found, theirs: Found | None) -> dict[str, Any]:
    runs = mine["runs"]
    return {
        "system": system,
        "memory_mib": round(median(mine["memory"])),
        "others": max(mine["others"]),
        "runs": len(runs),
        "sessions": len(mine["spans"]),
        "failed": mine["failed"],
        "grows": mine["summary"]["queue"]["grows"],
        "goodput": median(run["goodput"]["share"]["value"] for run in runs),
        "good_requests": median(run["goodput"]["requests"] for run in runs),
        "answer_tokens": median(run["throughput"]["answer_tokens"] for run in runs),
        "ttft_p50": median(run["ttft"]["p50"].get("value", math.nan) for run in runs),
        "hits": median(run["hits"]["ratio"].get("value", math.nan) for run in runs),
        "session": mine["summary"]["session"],
        "shorter": {f"p{q}": _shorter(theirs, mine, q) for q in (50, 95)},
    }


def _shorter(theirs: Found | None, mine: Found, q: int) -> dict[str, Any]:
    """How many times as long the first system's sessions take."""
    if theirs is None or theirs is mine:
        return {}
    return latency_ratio(theirs, mine, q).to_json()


HEADS = (
    "", "memory MiB", "within limits", "good requests/s", "answer tokens/s", "hits", "TTFT p50 s", "session p50 s",
    "session p95 s", "shorter p50", "shorter p95",
)  # fmt: skip


def page(rows: Sequence[Found], *, load: Found, birth: Found) -> str:
    """The page that is committed."""
    lines = ["# A family on vLLM, beside separate servers and adapters", ""]
    lines += [f"| {' | '.join(HEADS)} |", f"|{'---|' * len(HEADS)}"]
    for row in rows:
        cells = [
            SYSTEMS[row["system"]].told,
            f"{row['memory_mib']:,}",
            f"{100 * row['goodput']:.0f} %",
            *(f"{row[key]:.3g}" for key in ("good_requests", "answer_tokens")),
            f"{100 * row['hits']:.0f} %",
            f"{row['ttft_p50']:.2f}",
            *(told(row["session"][q], "s") for q in ("p50", "p95")),
            *(told(row["shorter"][q], "times") if row["shorter"][q] else "1" for q in ("p50", "p95")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", "![Seconds of a session](vllm-table.svg)", "", *_notes(rows, load, birth), ""]
    )


def _notes(rows: Sequence[Found], load: Found, birth: Found) -> list[str]:
    failed = ", ".join(f"{row['failed']} of {SYSTEMS[row['system']].short}" for row in rows if row["failed"])
    return [
        f"{load['members']} members, shape {load['shape']}, {load['dtype']}, random weights. ReAct sessions of "
        f"{3 * load['turns']} calls at {load['rate']:g} a second arrive at random and are the same for all systems: "
        f"{load['repeats']} runs of {load['sessions']} a start, {load['rounds']} starts of each system, every other "
        "round in the opposite order, two "
        "sessions before each that do not count. Middle columns are medians over runs; sessions are of all runs "
        "together, with an interval of 95 %; *shorter* says how many times as long the first system's sessions take. "
        f"Failed sessions: {failed or 'none'}. Of the time that the cores worked, at most "
        f"{100 * max(row['others'] for row in rows):.0f} % was for other programs.",
        "",
        "A session asks each of its members once, so what is found again was written for another. Every server runs on "
        "one thread, on cores in turns, for with two multi-LoRA was slower by far: a system of one server has one core, "
        f"and router and client the other. Every system has {load['cache_mib']} MiB for pages in all: nothing had to be "
        "forgotten. *Memory* is of all processes, what they share counted once (Pss), the router among them. *Within "
        "limits*: first text within 2 s, 0.2 s a token after it. On a processor vLLM gathers an adapter's weights anew "
        "for each token, which all systems with adapters pay; separate servers have none.",
        "",
        f"`{birth['command']}`, {birth['hardware']}, commit {birth['commit']}, {birth['date']}.",
    ]


def picture(rows: Sequence[Found]) -> str:
    """Seconds of a session, the middle one and the 95th percentile where there is one."""
    values: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for q in ("p50", "p95"):
        for row in rows:
            said, name = row["session"][q], f"{SYSTEMS[row['system']].short}, {q}"
            values[name] = said.get("value", math.nan)
            if "low" in said:
                intervals[name] = (said["low"], said["high"])
    return bars(values, title="Seconds of a session", unit="s", intervals=intervals)
