"""``heliostat bench speculate``: rules for drafted tokens side by side, with a page of tables and pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli.failing import stop
from heliostat.cli.printing import Family, Json, print_json
from heliostat.errors import Refused

Draft = Annotated[str, typer.Option(help="Module that drafts.", show_default=False)]
Prompts = Annotated[Path, typer.Option(help="Data that judges learn from, jsonl.", show_default=False)]
Test = Annotated[Path, typer.Option(help="Data with answers that no judge sees, jsonl.", show_default=False)]
HeldOut = Annotated[
    Path | None, typer.Option(help="The same, told in ways nobody was trained on.", show_default="none")
]
Member = Annotated[str | None, typer.Option(help="Member whose row answers.", show_default="the base alone")]
Members = Annotated[
    str | None,
    typer.Option(
        help="Others with the same speaker, NAME=DATA by comma: what is a judge of one worth to another?",
        show_default="none",
    ),
]
Metric = Annotated[str, typer.Option(help="How answers are graded: exact, contains, command.")]
Tau = Annotated[float | None, typer.Option(help="Threshold of scores, as in `judge`.", show_default="found")]
Items = Annotated[int, typer.Option(min=1, help="Test prompts, at most.")]
Batches = Annotated[str, typer.Option(help="Requests at once, by comma.")]
Repeats = Annotated[int, typer.Option(help="Turns of each batch; at least 5.")]
Seeds = Annotated[int, typer.Option(min=1, help="Judges.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Of an answer.")]
Rules = Annotated[
    str | None,
    typer.Option(help="Rules, by comma; off, lossless and both judged ones among them.", show_default="all"),
]
Out = Annotated[Path, typer.Option(help="Folder for points; what is there goes on.")]
Docs = Annotated[
    Path | None,
    typer.Option(help="Folder for the page, its numbers and pictures.", show_default="that of --out"),
]

Page = Annotated[str, typer.Option(help="Name of the page.")]


def speculate(
    family: Family,
    draft: Draft,
    prompts: Prompts,
    test: Test,
    held_out: HeldOut = None,
    member: Member = None,
    members: Members = None,
    metric: Metric = "contains",
    tau: Tau = None,
    items: Items = 200,
    batches: Batches = "1,2,4,8",
    repeats: Repeats = 5,
    seeds: Seeds = 3,
    max_tokens: MaxTokens = 160,
    rules: Rules = None,
    out: Out = Path("out/bench/speculate"),
    docs: Docs = None,
    page: Page = "selfjudge",
    as_json: Json = False,
) -> None:
    """None, look-up, lossless, judged, and rules without training: right answers and tokens a second.

    Ctrl-C keeps what was measured; the same command goes on from there.
    """
    from heliostat.bench.speculate import Measured, measure
    from heliostat.bench.speculate_page import write_page
    from heliostat.bench.speculated import ruled, verdicts

    wish = Measured(
        family=str(family),
        draft=draft,
        prompts=str(prompts),
        test=str(test),
        held_out=None if held_out is None else str(held_out),
        member=member,
        members=_named(members),
        metric=metric,
        tau=tau,
        items=items,
        batches=_counts(batches),
        repeats=repeats,
        seeds=seeds,
        longest=max_tokens,
        rules=_rules(rules),
        out=str(out),
    )
    try:
        found = measure(wish, tell=lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        stop(f"stopped; {out / 'points.json'} keeps what was measured, the same command goes on from there")
    path = write_page(found, docs or out, page)
    if as_json:
        return print_json({**found, "page": str(path)})
    print("\n".join(verdicts(ruled(found))))
    print(path)


def _rules(text: str | None) -> tuple[str, ...]:
    from heliostat.bench.speculate import CHOSEN, LOSSLESS, OFF, RULES

    wanted = RULES if text is None else tuple(part.strip() for part in text.split(","))
    if lacking := [rule for rule in (OFF, LOSSLESS, *CHOSEN) if rule not in wanted]:
        raise Refused(
            f"--rules {text}: {', '.join(lacking)} must be among them, all others are compared with these"
        )
    return wanted


def _named(text: str | None) -> dict[str, str]:
    if text is None:
        return {}
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    if any(not name or not data for name, data in pairs):
        raise Refused(
            f"--members {text}: NAME=DATA with commas between them, as told=told.jsonl,retold=retold.jsonl"
        )
    return dict(pairs)


def _counts(text: str) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise Refused(f"--batches {text}: whole numbers with commas between them, as 1,2,4") from error
    if found[0] < 1:
        raise Refused(f"--batches {text}: at least one request")
    return found
