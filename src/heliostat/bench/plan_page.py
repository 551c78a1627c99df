"""What was found in a log as a page and as tables: shared tokens, where prompts part, who was busy when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from heliostat.bench.counting import OWN, Counted
from heliostat.bench.fleet import Fleet, Priced
from heliostat.bench.planning import Plan
from heliostat.bench.report import footer, page, table
from heliostat.files import atomic_write_text
from heliostat.plot import bars, lines
from heliostat.serve.cluster import DECODE, PREFILL
from heliostat.serve.nodes import HEADS, Standing, told

Table = tuple[str, list[str], list[list[str]]]
"""(title, heads, rows)."""


def tables(plan: Plan) -> list[Table]:
    """Everything that is told in rows."""
    found = [_members(plan)]
    if plan.counted:
        found += [_counted(plan.counted, "As it is"), _savings(plan)]
    if plan.pairs:
        found.append(_pairs(plan))
    if plan.moved is not None:
        roles = ", ".join(f"{member} {tokens}" for member, tokens in plan.moved.roles.items())
        how = "guessed, tokens" if plan.moved.guessed else "tokens"
        found.append(_counted(plan.moved.counted, f"With each member's instructions last ({how}: {roles})"))
    if plan.fleet is not None:
        found.append(_fleet(plan.fleet))
    if plan.servers:
        found.append(stands(plan.servers))
    return found


def stands(servers: Sequence[Standing]) -> Table:
    """Where vLLM servers of a family fit."""
    return "vLLM servers", list(HEADS), told(servers)


def enough(plan: Plan) -> str:
    """Whether as many servers stand there as the load needs; empty where nobody asked."""
    own = [one.sized for one in plan.fleet.priced if one.sized.sharing == OWN] if plan.fleet else []
    if not own or not own[0].counts or not plan.servers:
        return ""
    reading, answering = (sum(one.role == role for one in plan.servers) for role in (PREFILL, DECODE))
    there = f"on these nodes {reading} read and {answering} answer"
    if both := own[0].both:
        return f"as simulated this family needs {both} workers that do both for this load; {there}"
    needs = (
        f"as simulated this family needs {own[0].prefill} workers that read and {own[0].decode} that answer"
    )
    short = [
        f"add nodes with role {role}"
        for role, wanted, have in (
            (PREFILL, own[0].prefill, reading),
            (DECODE, own[0].decode, answering),
        )
        if have < wanted
    ]
    return f"{needs} for this load; {there}: {', '.join(short) or 'enough'}"


def _fleet(fleet: Fleet) -> Table:
    heads = [
        "sharing",
        "prefill",
        "decode",
        "both",
        "an hour",
        "1M answer tokens",
        "TTFT p95",
        "TPOT p95",
        "how",
    ]
    title = (
        f"Workers on {fleet.machine} for TTFT {fleet.limits.ttft:g} s and TPOT {fleet.limits.tpot:g} s: "
        f"{fleet.requests:,} requests in {fleet.seconds:,.0f} s, the busiest of the log"
    )
    return title, heads, [_priced(one) for one in fleet.priced]


def _priced(one: Priced) -> list[str]:
    sized = one.sized
    if not sized.counts:
        return [sized.sharing, *["-"] * 7, sized.why_not]
    return [
        sized.sharing,
        str(sized.prefill),
        str(sized.decode),
        str(sized.both),
        "no price" if one.per_hour is None else f"{one.per_hour:,.2f}",
        "no price" if one.per_million is None else f"{one.per_million:,.2f}",
        "-" if sized.ttft is None else f"{sized.ttft:.2f} s",
        "-" if sized.tpot is None else f"{1000 * sized.tpot:.1f} ms",
        f"{sized.how}; {'own workers for members' if sized.apart else 'workers host all'}",
    ]


def _members(plan: Plan) -> Table:
    rows = [[name, f"{n:,}", f"{100 * n / plan.requests:.1f} %"] for name, n in plan.members.items()]
    return "Members", ["member", "requests", "share"], rows


def sentence(plan: Plan) -> str:
    """What was looked at."""
    balance = plan.balance
    said = (
        f"{plan.requests:,} requests in {plan.seconds:,.0f} s: {balance['prompt_tokens']:,} prompt tokens, "
        f"{balance['answer_tokens']:,} answer tokens (median {balance['prompt_median']:g} and "
        f"{balance['answer_median']:g})"
    )
    if "cached_tokens" in balance:
        said += (
            f"; {balance['cached_tokens'] / max(1, balance['prompt_tokens']):.1%} of the prompts were cached"
        )
    return said


def _counted(found: Sequence[Counted], title: str) -> Table:
    heads = [
        "sharing",
        "shared within a member",
        "across members",
        "prefilled",
        "kept",
        "peak in flight",
        "batch",
    ]
    rows = [
        [
            c.case,
            _share(c.cached_own, c.prompt),
            _share(c.cached_other, c.prompt),
            f"{c.prefill:,}",
            f"{c.kept:,}",
            "not told" if c.peak is None else f"{c.peak:,}",
            "not told" if c.batch is None else f"{c.batch:.2f}",
        ]
        for c in found
    ]
    return f"{title}: prompt tokens that need not run; tokens", heads, rows


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"


def _savings(plan: Plan) -> Table:
    rows = [[s.sharing, s.says, "yes" if s.worth else "no"] for s in plan.savings]
    return "Beside as many separate models, as counted", ["sharing", "what changes", "worth a trial"], rows


def _pairs(plan: Plan) -> Table:
    rows = [
        [p.member, p.other, f"{p.common / p.met:,.0f}", f"{p.prompt / p.met:,.0f}", f"{p.early / p.met:.0%}"]
        for p in plan.pairs
    ]
    heads = ["prompts of", "beside", "tokens alike", "of", "part before the first page"]
    return "Where prompts part (means, beside the closest of the latest)", heads, rows


def write_report(path: Path, plan: Plan, birth: Mapping[str, Any]) -> Path:
    """The page; returns its path."""
    parts = [
        f"<p><b>{escape(plan.verdict)}</b></p>",
        f"<p>{escape(sentence(plan))}.</p>",
        *(f"<p>{escape(note)}</p>" for note in plan.notes),
    ]
    if plan.fleet is not None:
        said = ". ".join(filter(None, (plan.fleet.verdict, enough(plan))))
        parts.insert(1, f"<p><b>{escape(said)}</b></p>")
    for title, heads, rows in tables(plan):
        parts += [f"<h2>{escape(title)}</h2>", table(heads, rows)]
    if plan.counted:
        prefill = {c.case: float(c.prefill) for c in plan.counted}
        parts.append(bars(prefill, title="prompt tokens that have to run", unit="tokens"))
        peaks = {c.case: float(c.peak) for c in plan.counted if c.peak is not None}
        if peaks:
            title = "keys and values that requests in flight held at most"
            parts.append(bars(peaks, title=title, unit="tokens"))
    if plan.windows:
        parts.append(_over_time(plan))
    parts += [_explained(), footer(birth)]
    atomic_write_text(path, page("heliostat plan", parts))
    return path


def _over_time(plan: Plan) -> str:
    series = {"requests a second": [(w.start, w.rate) for w in plan.windows]}
    if plan.windows[0].in_flight is not None:
        series["requests in flight"] = [(w.start, w.in_flight or 0.0) for w in plan.windows]
        series["members busy"] = [(w.start, w.members_busy or 0.0) for w in plan.windows]
    shares = {"top member's share": [(w.start, w.top_share) for w in plan.windows]}
    return lines(series, title="over time", x="seconds", y="", y_from_zero=True, shares=shares)


def _explained() -> str:
    return (
        "<p>Counted page by page with every page kept for ever: no cache finds more, a small one finds less. "
        "<i>kept</i>: keys and values there in the end; <i>peak in flight</i>: the most that requests held at once; "
        "<i>batch</i>: mean requests that one pass of decoding answers. Workers, where they are told, are simulated.</p>"
    )
