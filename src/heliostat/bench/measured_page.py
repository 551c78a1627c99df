"""What was measured of a server as a page: curves over the load, hits beside what could be hit, where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from heliostat.bench.report import footer, page, table
from heliostat.files import atomic_write_text
from heliostat.plot import bars, lines

Points = list[tuple[float, float]]


def write_report(path: Path, results: Mapping[str, Any]) -> Path:
    """The page of a results.json; returns its path."""
    runs = [run for run in results["runs"] if run["requests"]["due"]]
    atomic_write_text(path, page(f"heliostat bench: {results['load']['what']}", _parts(results, runs)))
    return path


def _parts(results: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    if not runs:
        return ["<p>Nothing was measured.</p>", footer(results["birth"])]
    limits = results["limits"]
    return [
        *(f'<p class="wrong">{escape(line)}</p>' for line in warnings(results, runs)),
        f"<p>{escape(results['url'])}; members {escape(', '.join(results['members']))}. A request counts as goodput "
        f"where its first text came within {limits['ttft']:g} s of when it was due and its tokens within "
        f"{limits['tpot']:g} s each (MLPerf-style limits).</p>",
        table(*overview(runs), numbers=tuple(range(9))),
        "<h2>Throughput and latency</h2>",
        _latency(runs),
        "<h2>Goodput</h2>",
        _goodput(runs),
        "<h2>Prompt tokens that did not have to run</h2>",
        _hits(results, runs),
        "<h2>Seconds a token</h2>",
        lines(
            {_name(run): [(x, y) for x, y in run["tpot_steps"]] for run in runs},
            title="seconds a token after the first",
            x="seconds",
            y="share of requests up to it",
            y_from_zero=True,
        ),
        "<h2>Where the time went, as far as a client sees</h2>",
        *(
            bars(run["where"], title=f"{_name(run)}: mean of a request", unit="s")
            for run in runs
            if run["where"]
        ),
        *_phases(runs),
        "<h2>Members</h2>",
        table(*_members(runs), numbers=(2, 3, 4, 5, 6)),
        footer(results["birth"]),
    ]


def _phases(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What only the server can tell apart, where it does."""
    told = [run for run in runs if run["phases"]["told"]]
    if not told:
        return [
            "<p>Before the first text lie the way there, the queue and prefill. Only the server can tell them apart, "
            "and this one does not.</p>"
        ]
    heads = ["load", "answers", *told[0]["phases"]["p50"]]
    rows = [
        [
            _name(run),
            str(run["phases"]["told"]),
            *(f"{1000 * seconds:.3g} ms" for seconds in run["phases"]["p50"].values()),
        ]
        for run in told
    ]
    return [
        "<h2>Where the time went, as the server tells</h2>",
        *(bars(r["phases"]["mean"], title=f"{_name(r)}: mean of a request", unit="s") for r in told),
        "<p>Medians:</p>",
        table(heads, rows, numbers=tuple(range(1, len(heads)))),
        "<p>Where one worker does all, prefill goes up to the first token. The rest is HTTP and the client.</p>",
    ]


def _name(run: Mapping[str, Any]) -> str:
    return f"run {run['run'] + 1}" if run["rate"] is None else f"{run['rate']:g} sessions/s"


def warnings(results: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before believing a number."""
    found = [f"{_name(run)}: {run['client']['why']}" for run in runs if run["client"]["slow"]]
    found += [
        f"{_name(run)}: the queue grows, {run['queue']['why']}" for run in runs if run["queue"]["grows"]
    ]
    for run in runs:
        asked = run["requests"]
        if asked["without_usage"]:
            found.append(
                f"{_name(run)}: {asked['without_usage']} answers without usage: chunks counted as tokens"
            )
        if asked["stand_ins"]:
            found.append(
                f"{_name(run)}: prompts held stand-ins for {asked['stand_ins']} answers, because the server tells no ids: "
                "reuse of answers is not measured"
            )
        if asked["bundled"]:
            found.append(
                f"{_name(run)}: {asked['bundled']} answers came many tokens at a time: their first text is not "
                "their first token, and their seconds a token are not those of the server"
            )
        if asked["short"]:
            found.append(f"{_name(run)}: {asked['short']} answers are shorter than was asked for")
    if results["stopped"]:
        found.append("stopped early: what was under way then is not counted")
    return found


def overview(
    runs: Sequence[Mapping[str, Any]], *, intervals: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table that says it all."""

    def said(estimate: Mapping[str, Any], unit: str) -> str:
        return told(estimate, unit, interval=intervals)

    heads = [
        "load",
        "due",
        "answered",
        "429",
        "goodput",
        "requests/s",
        "tokens/s",
        "TTFT p50 / p95",
        "TPOT p50 / p95",
    ]
    rows = [
        [
            _name(run),
            str(run["requests"]["due"]),
            str(run["requests"]["answered"]),
            str(run["requests"]["too_many"]),
            said(run["goodput"]["share"], "%"),
            f"{run['throughput']['requests']:.2f}",
            f"{run['throughput']['answer_tokens']:.1f}",
            f"{said(run['ttft']['p50'], 's')} / {said(run['ttft']['p95'], 's')}",
            f"{said(run['tpot']['p50'], 's')} / {said(run['tpot']['p95'], 's')}",
        ]
        for run in runs
    ]
    return heads, rows


def told(estimate: Mapping[str, Any], unit: str, *, interval: bool = True) -> str:
    """A number with its interval, or why there is none. Short times are in milliseconds."""
    if "value" not in estimate:
        return str(estimate["why_not"])
    times, sign = (100, " %") if unit == "%" else (1, f" {unit}")
    if unit == "s" and estimate["value"] < 1:
        times, sign = 1000, " ms"
    text = f"{times * estimate['value']:.3g}{sign}"
    if interval and "low" in estimate:
        text += f" [{times * estimate['low']:.3g}, {times * estimate['high']:.3g}]"
    return text


def _latency(runs: Sequence[Mapping[str, Any]]) -> str:
    kinds = {"to the first text": "ttft", "whole request": "latency", "whole session": "session"}
    series: dict[str, Points] = {}
    intervals: dict[str, list[tuple[float, float, float]]] = {}
    for name, kind in kinds.items():
        for q in ("p50", "p95"):
            label = f"{name}, {q}"
            known = [(run["throughput"]["requests"], run[kind][q]) for run in runs if "value" in run[kind][q]]
            if known:
                series[label] = [(x, e["value"]) for x, e in known]
                intervals[label] = [(x, e["low"], e["high"]) for x, e in known if "low" in e]
    return lines(
        series,
        title="latency over throughput",
        x="requests answered a second",
        y="seconds",
        y_from_zero=True,
        intervals=intervals,
    )


def _loads(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Where runs stand on an axis of load."""
    return [run["run"] + 1.0 if run["rate"] is None else run["rate"] for run in runs]


def _goodput(runs: Sequence[Mapping[str, Any]]) -> str:
    known = [(x, run["goodput"]["share"]) for x, run in zip(_loads(runs), runs, strict=True)]
    return lines(
        {"within the limits": [(x, e["value"]) for x, e in known]},
        title="share of the requests that were due",
        x="load (sessions a second, or run)",
        y="share",
        y_from_zero=True,
        intervals={"within the limits": [(x, e["low"], e["high"]) for x, e in known if "low" in e]},
    )


def _hits(results: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    measured = [(x, run["hits"]["ratio"]) for x, run in zip(_loads(runs), runs, strict=True)]
    known = [(x, e) for x, e in measured if "value" in e]
    series: dict[str, Points] = {"measured": [(x, e["value"]) for x, e in known]} if known else {}
    for name in results["ceilings"][0]:
        at = [(x, results["ceilings"][n][name]["hit_ratio"]) for n, x in enumerate(_loads(runs))]
        series[f"most there is: {name}"] = at
    picture = lines(
        series,
        title="share of prompt tokens found in the cache",
        x="load (sessions a second, or run)",
        y="share",
        y_from_zero=True,
        intervals={"measured": [(x, e["low"], e["high"]) for x, e in known if "low" in e]},
    )
    why = "" if known else "<p>The server tells no cached_tokens: only what could be found is shown.</p>"
    return (
        picture
        + why
        + (
            "<p>The most there is: counted in the ids that were planned, with every page kept, were all members of that "
            "sharing. It is no measurement.</p>"
        )
    )


def _members(runs: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    heads = ["load", "member", "due", "answered", "prompt tokens", "of them cached", "answer tokens"]
    keys = ("due", "answered", "prompt_tokens", "cached_tokens", "answer_tokens")
    rows = [
        [_name(run), member, *(str(sums[key]) for key in keys)]
        for run in runs
        for member, sums in run["by_member"].items()
    ]
    return heads, rows
