"""``heliostat eval``: how many of a member's answers to held-out data are right, and some that are not."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from heliostat.cli.answering import CacheMib, Dtype, Member
from heliostat.cli.printing import Family, Json, note, percent, print_json, print_samples, print_table
from heliostat.family import choose
from heliostat.tasks.grade import DEFAULT_METRIC, METRICS, METRICS_SHOWN


def grade_member(
    family: Family,
    data: Annotated[Path, typer.Option(help="Held-out prompts with answers, jsonl.", show_default=False)],
    member: Member = "base",
    metric: Annotated[str, typer.Option(help=f"How an answer is judged. {METRICS_SHOWN}.")] = DEFAULT_METRIC,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many.", show_default="all")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Wrong answers that are shown.")] = 3,
    dtype: Dtype = "auto",
    cache_mib: CacheMib = 1024,
    as_json: Json = False,
) -> None:
    """Answers are greedy. The family remembers a member's accuracy; `heliostat inspect` shows it."""
    choose(metric, METRICS, what="metric")
    from heliostat.llm import LLM
    from heliostat.train.evaluate import evaluate
    from heliostat.train.tune import note_evaluation

    llm = LLM(family, members=[member], dtype=dtype, cache_mib=cache_mib)
    begin = time.perf_counter()
    note(f"{member} answers ...")
    found = evaluate(llm, member, data, metric=metric, limit=limit)
    seconds = time.perf_counter() - begin
    if member in llm.family.members:
        note_evaluation(family, member, found.facts)
    wrong = [
        {"prompt": item.prompt, "answer": item.answer, "reference": item.reference}
        for item in islice((item for item in found.items if not item.right), samples)
    ]
    facts: dict[str, Any] = {"member": member, **found.facts, "seconds": round(seconds, 2)}
    if as_json:
        return print_json(facts | {"data": str(data), "wrong": wrong})
    rows = [
        ("accuracy", percent(found.accuracy)),
        ("metric", metric),
        ("items", f"{len(found.items):,}"),
        *([("cut by their length", f"{found.cut:,}")] if found.cut else []),
        ("seconds", f"{seconds:.1f}"),
    ]
    print_table(rows, title=f"{member} on {data}")
    if wrong:
        print_samples(wrong, title="wrong answers")
