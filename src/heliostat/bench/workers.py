"""Workers saved at equal service: each worker measured alone on one core, the service composed on counted time. No torch.

These are numbers of kind (B): how many workers a service would need. They are never mixed with what systems do that share
the same two cores. Load is told in multiples of what separate models keep with one worker for each member and role.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

from heliostat.bench.costs import Fitted
from heliostat.bench.counting import Case, cases
from heliostat.bench.layout import Machine, pools_of
from heliostat.bench.machines import measured_machine
from heliostat.bench.records import Limits
from heliostat.bench.report import footer, page, table
from heliostat.bench.sizing import Sized, Sizing
from heliostat.bench.workloads import Load, Session, sessions
from heliostat.errors import Refused
from heliostat.family import SHARINGS, choose
from heliostat.files import atomic_write_text
from heliostat.plot import bars

APART = "independent"
OWN = "independent, own workers"
"""Told beside the better layout where that is another: as most services, and the papers' baselines, are laid out."""
LIMITS = Limits(ttft=1.0, tpot=0.02)
"""Where nobody says others. MLPerf-style; the values are ours, for models of 24 million parameters on one core."""
LOADS = (0.5, 1.0, 2.0)
"""Times the most that separate models keep with one worker a member and role."""
HALVINGS = 5
"""Of the interval in which that most is looked for."""
SHORTEST = 4.0
"""Seconds in which the sessions of a point come at least: in less, there is no load to speak of."""


@dataclass(frozen=True, slots=True)
class Found:
    """Everything of one run."""

    limits: Limits
    load: Load
    peak: float
    """Sessions a second that separate models keep with one worker a member and role."""
    rows: tuple[Mapping[str, Any], ...]
    """Load, and what each sharing needs."""
    about: Mapping[str, Any]
    """Where the costs come from."""


def machine_of(costs: Fitted) -> Machine:
    """A worker of one core. Refused for costs of several threads: such workers are not alone on a core."""
    if costs.about.get("threads") != 1:
        raise Refused(
            f"the costs were measured with {costs.about.get('threads')} threads: a worker here has one core. Measure "
            "with python -m heliostat.bench.steps --threads 1"
        )
    return measured_machine(costs)


def named(name: str, members: Sequence[str]) -> Case:
    """A sharing's rows for these members."""
    choose(name, SHARINGS, what="sharing")
    return next(case for case in cases(members) if case.name == name)


def peak_of(machine: Machine, load: Load, limits: Limits) -> float:
    """Sessions a second that separate models keep with one worker a member and role, found by halving."""
    case = named(APART, load.members)
    pools = pools_of(case, split=True, apart=True)
    counts = {pool.name: 1 for pool in pools}

    def kept(rate: float) -> bool:
        sizing = Sizing(machine, case, sessions(replace(load, rate=rate)), limits)
        return sizing.keeps(pools, counts)

    low, high = 0.0, 0.25
    while kept(high):
        low, high = high, 2 * high
        if high * SHORTEST > load.sessions:
            raise Refused(
                f"{load.sessions} sessions do not fill {len(pools)} workers within {SHORTEST:g} s: more of them at a "
                "time are needed to find the most. Give --sessions more, or narrower limits"
            )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) else (low, middle)
    if not low:
        raise Refused(
            f"separate models keep these limits (TTFT {limits.ttft:g} s, TPOT {limits.tpot:g} s) at no load with one "
            "worker a member: there is nothing to compare with. Take wider limits, or a smaller shape"
        )
    return low


def compare(
    machine: Machine,
    load: Load,
    limits: Limits,
    *,
    names: Sequence[str],
    about: Mapping[str, Any],
    loads: Sequence[float] = LOADS,
    tell: Any = None,
) -> Found:
    """How many workers each sharing needs at each load."""
    compared = {name: named(name, load.members) for name in dict.fromkeys((APART, *names))}
    peak, rows = peak_of(machine, load, limits), []
    for times in loads:
        asked = sessions(replace(load, rate=times * peak))
        for name, case in compared.items():
            tried = layouts(machine, case, asked, limits)
            best = fewest(tried)
            for found in tried:
                if found is not best and (name != APART or not found.apart):
                    continue
                label = name if found is best else OWN
                facts = {**asdict(found), "sharing": label, "workers": found.workers}
                rows.append({"load": times, "rate": times * peak, **facts})
                if tell is not None:
                    tell(
                        f"{times:g}x {label}: {found.prefill} prefill, {found.decode} decode {found.why_not}"
                    )
    return Found(limits, load, peak, tuple(rows), about)


def layouts(machine: Machine, case: Case, asked: Sequence[Session], limits: Limits) -> list[Sized]:
    """Workers that prefill and workers that decode: members have workers of their own, or every worker hosts all."""
    sizing = Sizing(machine, case, asked, limits)
    return [sizing.find(split=True, apart=apart) for apart in (True, False)]


def fewest(tried: Sequence[Sized]) -> Sized:
    """The layout with the fewest workers, and of those alike the fewest that decode."""
    able = [one for one in tried if one.counts]
    return min(able, key=lambda one: (one.workers, one.decode)) if able else tried[0]


def told(found: Found) -> list[list[str]]:
    """The table, a line for each load and sharing."""
    apart = {row["load"]: row for row in found.rows if row["sharing"] == APART}
    lines = []
    for row in found.rows:
        base = apart[row["load"]]
        head = [f"{row['load']:g}", row["sharing"]]
        if not row["counts"]:
            lines.append([*head, "-", "-", "-", "-", "-", "-", "-", row["why_not"]])
            continue
        ratio = ["-", "-"]
        if base["counts"]:
            ratio = [f"{base[k] / row[k]:.2f}x" for k in ("decode", "workers")]
        lines.append(
            [
                *head,
                str(row["prefill"]),
                str(row["decode"]),
                *ratio,
                _said(row["tpot"], 1000, ".1f"),
                _said(row["ttft"], 1000, ".0f"),
                _said(row["goodput"], 1, ".1%"),
                "own workers for each member" if row["apart"] else "every worker hosts all",
            ]
        )
    return lines


def _said(value: float | None, times: float, how: str) -> str:
    """A number, or that there is none: formulas tell workers only."""
    return "reckoned" if value is None else format(times * value, how)


HEADS = (
    "load",
    "sharing",
    "prefill workers",
    "decode workers",
    "decode workers saved",
    "of the service",
    "TPOT p95, ms",
    "TTFT p95, ms",
    "goodput",
    "layout",
)


def sentences(found: Found) -> list[str]:
    """What the table is of."""
    load, limits, about = found.load, found.limits, found.about
    error = about["error"]
    return [
        "Numbers of kind (B), simulated: each worker is one core alone, with costs fitted to measured steps "
        f"(shape {about['shape']}, {about['dtype']}, one thread; held-out steps: half within {error['median']:.0%}, 95 % "
        f"within {error['p95']:.0%}); the service is composed on counted time by the real router and scheduler.",
        f"{len(load.members)} members, Zipf exponent {load.popularity:g}, workflow {load.workflow}, {load.sessions} "
        f"sessions a point, seed {load.seed}. Load 1: {found.peak:.2f} sessions a second, the most that separate models "
        "keep with one worker for each member and role.",
        f"Fewest workers with which 95 % of each pool's requests keep TTFT {limits.ttft:g} s and TPOT "
        f"{1000 * limits.tpot:g} ms. Saved: workers of separate models over workers of this sharing.",
    ]


def markdown(found: Found, birth: Mapping[str, Any]) -> str:
    """The page for docs/results."""
    rule = "|---" * len(HEADS) + "|"
    rows = ["| " + " | ".join(line) + " |" for line in (list(HEADS), *told(found))]
    certificate = f"`{birth['command']}`; {birth['hardware']}; commit {birth['commit']}; {birth['date']}"
    body = "\n\n".join(sentences(found))
    return "\n".join(
        ["# Workers saved at equal service", "", body, "", certificate, "", rows[0], rule, *rows[1:], ""]
    )


def write_report(path: Path, found: Found, birth: Mapping[str, Any]) -> None:
    """The same as a page with pictures."""
    parts = [f"<p>{escape(line)}</p>" for line in sentences(found)]
    parts.append(table(list(HEADS), told(found)))
    for times in dict.fromkeys(row["load"] for row in found.rows):
        own = [row for row in found.rows if row["load"] == times and row["counts"]]
        if own:
            counts = {row["sharing"]: float(row["decode"]) for row in own}
            parts.append(bars(counts, title=f"decode workers at load {times:g}", unit="workers"))
    atomic_write_text(path, page("heliostat bench workers", [*parts, footer(birth)]))
