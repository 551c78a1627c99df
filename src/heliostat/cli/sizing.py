"""``heliostat bench workers``: how many workers each sharing needs at equal service, simulated from measured steps."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliostat.cli.printing import Json, note, print_json, print_table
from heliostat.errors import Refused

if TYPE_CHECKING:
    from heliostat.bench.costs import Fitted
    from heliostat.bench.workers import Found


def workers(
    costs: Annotated[
        Path, typer.Option(help="Table of python -m heliostat.bench.steps --threads 1.", show_default=False)
    ],
    members: Annotated[int, typer.Option(min=1, help="How many members.")] = 4,
    popularity: Annotated[str, typer.Option(help="uniform, or zipf:1.2.")] = "zipf:1.2",
    compare: Annotated[str, typer.Option(help="Sharings beside separate models, by comma.")] = "sun",
    workflow: Annotated[str, typer.Option(help="react, reflexion or fanout.")] = "react",
    turns: Annotated[int, typer.Option(min=1, help="Rounds of a workflow.")] = 2,
    context: Annotated[int, typer.Option(min=1, help="Mean tokens that a session begins with.")] = 128,
    answer: Annotated[int, typer.Option(min=1, help="Mean tokens of an answer.")] = 64,
    sessions: Annotated[int, typer.Option(min=1, help="Sessions of a point.")] = 200,
    loads: Annotated[
        str, typer.Option(help="Times what separate models keep with one worker a member and role.")
    ] = "0.5,1,2",
    ttft: Annotated[float, typer.Option(help="Limit, seconds.")] = 1.0,
    tpot: Annotated[float, typer.Option(help="Limit, seconds.")] = 0.02,
    seed: Annotated[int, typer.Option(help="The same seed, the same sessions.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for results.json and report.html.")] = Path("out/workers"),
    docs: Annotated[
        Path | None, typer.Option(help="Folder for the page workers.md and workers.json.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Kind (B): each worker alone on one core, as measured; the service on counted time, by the real router."""
    from heliostat.bench.costs import read_costs
    from heliostat.bench.records import Limits
    from heliostat.bench.workers import HEADS, machine_of, sentences, told
    from heliostat.bench.workers import compare as look
    from heliostat.bench.workloads import Lengths, Load, popularity_named

    measured = read_costs(costs)
    load = Load(
        members=tuple(f"member{n}" for n in range(members)),
        workflow=workflow,
        turns=turns,
        sessions=sessions,
        popularity=popularity_named(popularity),
        assignment="draw",
        seed=seed,
        lengths=Lengths(context=context, role=16, answer=answer, observation=32),
    )
    found = look(
        machine_of(measured),
        load,
        Limits(ttft=ttft, tpot=tpot),
        names=compare.split(","),
        about=measured.about,
        loads=_numbers(loads),
        tell=note,
    )
    facts = _write(found, measured, out, docs)
    if as_json:
        return print_json(facts)
    print("\n".join(sentences(found)))
    print_table(told(found), title="workers at equal service", columns=list(HEADS))
    print(f"report: {out / 'report.html'}")


def _write(found: Found, measured: Fitted, out: Path, docs: Path | None) -> dict[str, Any]:
    """results.json, report.html and the page; returns what results.json holds."""
    from heliostat.bench.birth import certificate
    from heliostat.bench.workers import markdown, write_report
    from heliostat.files import atomic_write_text

    command = shlex.join(["heliostat", *sys.argv[1:]])
    birth = certificate(command, costs=measured.about["birth"], seed=found.load.seed)
    facts = {"birth": birth, "kind": "B: workers saved at equal service, simulated", **asdict(found)}
    text = json.dumps(facts, indent=1, default=str) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / "results.json", text)
    write_report(out / "report.html", found, birth)
    if docs is not None:
        docs.mkdir(parents=True, exist_ok=True)
        atomic_write_text(docs / "workers.json", text)
        atomic_write_text(docs / "workers.md", markdown(found, birth))
    return facts


def _numbers(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise Refused(f"--loads {text}: numbers with commas between them, as 0.5,1,2") from error
    if not all(0 < one <= 100 for one in found):
        raise Refused(f"--loads {text}: allowed is above 0 to 100")
    return found
