"""From the points of a comparison to what may be said of it: ratios with intervals beside their ceilings. No torch.

A ratio of peaks is of runs made in turns; a ratio of latencies is of the same sessions under the same load, and there is
none where a queue grows. A ceiling is arithmetic: the baseline's own seconds, with as many prompt tokens taken off
as the other system need not run when every page is kept, and nothing else changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from heliostat.bench.comparison import NO_HELP, Comparison, Variant
from heliostat.bench.counting import Counted
from heliostat.bench.statistics import Estimate, bootstrap, interval, paired_ratio
from heliostat.bench.systems import SYSTEMS

TRIED, PILOTS, PEAK, LOADED = "tried", "pilot", "peak", "load"
Found = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Paper:
    """What was reported elsewhere, as times of the baseline's throughput and parts of its 95th percentile."""

    throughput: str
    p95: str
    setting: str


ONE_GPU = "one GPU, 8B models, HotpotQA agents in turn, against multi-LoRA with a cache for each adapter"
A100S = "4 agents on 8 A100s, 4 pairs of workers against 4 shared prefill and 4 decode workers"
PAPERS: Mapping[tuple[str, str, int], Paper] = {
    ("icarus", "react", 2): Paper("1.4x", "3.8x", ONE_GPU),
    ("icarus", "react", 4): Paper("2.3x", "5.1x", ONE_GPU),
    ("icarus", "react", 8): Paper("3.8x", "11.1x", ONE_GPU),
    ("prefillshare", "react", 4): Paper("3.6x", "3.9x", A100S),
    ("prefillshare", "reflexion", 4): Paper("3.9x", "4.5x", A100S),
}


def key(it: Comparison, *parts: object) -> str:
    """Name of a point, which is a file's name, too."""
    words = "-".join(str(part) for part in parts if part != "")
    return f"n{len(it.load.members)}-" + re.sub(r"[^a-z0-9.]+", "-", words.lower())


def best_cap(it: Comparison, found: Found, system: str) -> int:
    """With which a system got through most sessions a second."""
    return max(it.caps, key=lambda cap: found[key(it, TRIED, system, cap)]["sessions_a_second"])


def able_caps(it: Comparison, found: Found, rate: float) -> list[int]:
    """With which the baseline gets through so many sessions a second; where none does, the best one."""
    able = [
        cap for cap in it.caps if found[key(it, TRIED, it.baseline.name, cap)]["sessions_a_second"] >= rate
    ]
    return able or [best_cap(it, found, it.baseline.name)]


def best_pilot(it: Comparison, found: Found, load: float) -> int:
    """With which the baseline kept most limits at a load; of equal ones that with the quickest sessions."""

    def rating(cap: int) -> tuple[float, float]:
        said = found[key(it, PILOTS, load, cap)]["summary"]
        return said["goodput"]["share"]["value"], -said["session"]["p50"]["value"]

    return max((cap for cap in it.caps if found[key(it, PILOTS, load, cap)]), key=rating)


def peak(it: Comparison, found: Found) -> float:
    """Sessions a second that the baseline gets through at most: the median of its rounds."""
    points = _rounds(it, found, None, it.baseline.name)
    return float(median(point["sessions_a_second"] for point in points))


def _rounds(it: Comparison, found: Found, variant: Variant | None, system: str) -> list[Any]:
    names = [key(it, PEAK, variant.name if variant else "", system, number) for number in range(it.rounds)]
    return [found[name] for name in names if name in found]


def compared(it: Comparison, found: Found, *, pages: int, memory: Mapping[str, int]) -> dict[str, Any]:
    """All that is said of a comparison, as far as its points are there."""
    return {
        "members": len(it.load.members),
        "systems": [system.name for system in it.systems],
        "shape": it.shape,
        "pool": it.pool,
        "pages": pages,
        "weights_bytes": dict(memory),
        "load": asdict(it.load),
        "limits": asdict(it.limits),
        "rounds": it.rounds,
        "caps": {system.name: _caps(it, found, system.name) for system in it.systems},
        "peaks": [part for variant in (None, *it.variants) if (part := _peaks(it, found, variant))],
        "loads": [part for load in it.loads if (part := _load(it, found, load))],
    }


def _caps(it: Comparison, found: Found, system: str) -> dict[str, float]:
    tried = {cap: found.get(key(it, TRIED, system, cap)) for cap in it.caps}
    return {str(cap): point["sessions_a_second"] for cap, point in tried.items() if point}


# ---- peaks


def _peaks(it: Comparison, found: Found, variant: Variant | None) -> dict[str, Any] | None:
    rounds = {system.name: _rounds(it, found, variant, system.name) for system in it.systems}
    whole = min(map(len, rounds.values()))
    if not whole:
        return None
    changed = it if variant is None else it.changed(variant)
    theirs = rounds[it.baseline.name][:whole]
    made = [s for n, point in enumerate(theirs) for s in changed.at_once(10 + n, point["sessions"])]
    counted = changed.counted(made)
    systems = {}
    for name, points in rounds.items():
        systems[name] = _peak(points[:whole], theirs, counted[name], len(made))
        systems[name] |= {"ceiling": ceiling(theirs, counted[name], len(made))}
    return {
        "variant": variant.name if variant else "",
        "no_help": variant in NO_HELP,
        "pool": changed.pool,
        "systems": systems,
    }


def _peak(points: Sequence[Any], theirs: Sequence[Any], counted: Counted, sessions: int) -> dict[str, Any]:
    mine = [point["sessions_a_second"] for point in points]
    ratio = paired_ratio(mine, [point["sessions_a_second"] for point in theirs])
    walls = sum(sum(point["shares"].values()) for point in points)
    return {
        "cap": points[0]["cap"],
        "sessions_a_second": mine,
        "median": median(mine),
        "ratio": ratio.to_json(),
        "hit_ratio": median(point["hits"]["ratio"].get("value", math.nan) for point in points),
        "most_hits": counted.cached / counted.prompt,
        "prefill_rows_a_session": sum(p["sheet"]["prefill_rows"] for p in points)
        / sum(p["sessions"] for p in points),
        "least_prefill_rows_a_session": counted.prefill / sessions,
        "answer_rows_a_session": counted.answer_rows / sessions,
        "preemptions": sum(point["sheet"]["preemptions"] for point in points),
        "shares": {n: sum(p["shares"][n] for p in points) / walls for n in points[0]["shares"]},
    }


def ceiling(theirs: Sequence[Any], counted: Counted, sessions: int) -> dict[str, float]:
    """The most that running fewer prompt tokens can give, in times of the baseline.

    ``prefill``: prompt tokens that the baseline ran / those that must run. ``throughput``: with the baseline's own
    seconds for all else. Decoding that becomes cheaper, or dearer, is not in it.
    """
    ran = sum(point["sheet"]["prefill_rows"] for point in theirs)
    seconds = {n: sum(point["shares"][n] for point in theirs) for n in ("prefill", "decode", "client")}
    kept = seconds["prefill"] * counted.prefill / ran + seconds["decode"] + seconds["client"]
    return {
        "prefill": ran / counted.prefill,
        "throughput": sum(seconds.values()) / kept,
        "prompt_tokens_a_session": counted.prompt / sessions,
        "prefill_tokens_a_session": counted.prefill / sessions,
    }


# ---- loads


def _load(it: Comparison, found: Found, load: float) -> dict[str, Any] | None:
    points = {system.name: found.get(key(it, LOADED, load, system.name)) for system in it.systems}
    there = {name: point for name, point in points.items() if point}
    if not there:
        return None
    theirs = points[it.baseline.name]
    systems = {
        name: {
            "cap": point["cap"],
            "summary": point["summary"],
            "shares": point["shares"],
            "preemptions": point["sheet"]["preemptions"],
            **(
                {f"p{q}_ratio": latency_ratio(theirs, point, q).to_json() for q in (50, 95)} if theirs else {}
            ),
        }
        for name, point in there.items()
    }
    return {"load": load, "rate": next(iter(there.values()))["rate"], "systems": systems}


def latency_ratio(theirs: Any, mine: Any, q: int) -> Estimate:
    """How many times as long the baseline's sessions take, at a percentile; an interval over the same sessions."""
    for point in (theirs, mine):
        if point["summary"]["queue"]["grows"]:
            return Estimate(None, why_not="the queue grows")
        told = point["summary"]["session"][f"p{q}"]
        if "value" not in told:
            return Estimate(None, why_not=told["why_not"])
    base, own = (_seconds(point) for point in (theirs, mine))
    both = sorted(base.keys() & own.keys())

    def quotient(some: Sequence[str]) -> float:
        return _nearest([base[n] for n in some], q) / _nearest([own[n] for n in some], q)

    return Estimate(quotient(both), *interval(bootstrap(both, quotient)))


def _seconds(point: Any) -> dict[str, float]:
    return {number: end - start for number, (start, end) in point["spans"].items()}


def _nearest(values: Sequence[float], q: int) -> float:
    return sorted(values)[max(1, math.ceil(len(values) * q / 100)) - 1]


def paper(system: str, load: Found, members: int) -> Paper | None:
    """What was reported of a system in the setting that is nearest; None where nothing was."""
    return PAPERS.get((system, load["workflow"], members))


def told_systems(names: Sequence[str]) -> str:
    """What the systems are, in one line."""
    return "; ".join(f"{name}: {SYSTEMS[name].told}" for name in names)
