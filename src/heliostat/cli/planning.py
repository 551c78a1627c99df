"""``heliostat plan``: what a log of requests says about sharing, do not switch included, and where servers would stand."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliostat.cli.printing import Json, note, print_json, print_table
from heliostat.errors import Refused

if TYPE_CHECKING:
    from heliostat.bench.counting import Case
    from heliostat.bench.layout import Machine
    from heliostat.bench.logs import Log, Tokenize
    from heliostat.bench.planning import Plan
    from heliostat.serve.nodes import Standing

Gpu = Annotated[
    str | None, typer.Option(help="A GPU: workers and cost are told, as simulated.", show_default=False)
]
Costs = Annotated[
    Path | None, typer.Option(help="Instead: a table of python -m heliostat.bench.steps.", show_default=False)
]
Price = Annotated[
    float | None, typer.Option(help="Of one worker for an hour, in any currency.", show_default=False)
]
Model = Annotated[
    str | None, typer.Option(help="1b, 3b, 8b, 70b or a config.json; the family's base.", show_default=False)
]

_USUAL: dict[str, Any] = {"price": None, "model": None, "ttft": 2.0, "tpot": 0.05, "stretch": 1_000}
"""What options that belong to a machine are, where they are not given."""


def plan(
    logs: Annotated[
        Path | None,
        typer.Option(help="jsonl, one request a line; docs/measuring.md says what.", show_default=False),
    ] = None,
    family: Annotated[
        Path | None,
        typer.Option(help="Its tokenizer counts texts, and its rows are counted too.", show_default=False),
    ] = None,
    nodes: Annotated[
        Path | None,
        typer.Option(help="Machines: where the family's vLLM servers fit.", show_default=False),
    ] = None,
    page_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a page.")] = 16,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out lines that are no request.")
    ] = False,
    gpu: Gpu = None,
    costs: Costs = None,
    price: Price = None,
    model: Model = None,
    ttft: Annotated[float, typer.Option(help="Limit, seconds.")] = _USUAL["ttft"],
    tpot: Annotated[float, typer.Option(help="Limit, seconds.")] = _USUAL["tpot"],
    stretch: Annotated[int, typer.Option(min=2, help="Requests of the log that are simulated.")] = _USUAL[
        "stretch"
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.json and report.html.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Counts what prompts have in common, within and across members, and what each sharing would save of it.

    With --family and --nodes also where the family's vLLM servers fit; that needs no log.
    """
    from dataclasses import replace

    from heliostat.bench.fleet import fleet
    from heliostat.bench.logs import read_log
    from heliostat.bench.planning import plan as look
    from heliostat.bench.records import Limits

    servers = _servers(family, nodes)
    machine = (gpu, costs)
    if machine == (None, None) and (
        unused := _unused(price=price, model=model, ttft=ttft, tpot=tpot, stretch=stretch)
    ):
        raise Refused(f"{unused} says nothing without a machine: give --gpu, or --costs")
    if logs is None:
        return _show_servers(servers, machine, out, as_json)
    log = read_log(logs, tokenize=_tokenizer(family), skip_bad=skip_bad)
    own = _rows(family, log)
    found = replace(look(log, own=own, size=page_tokens), servers=servers)
    if machine != (None, None):
        runs_on, assumed = _machine(gpu, costs, model, family)
        limits = Limits(ttft=ttft, tpot=tpot)
        sized = fleet(log, runs_on, limits, price=price, own=own, stretch=stretch)
        found = replace(found, fleet=sized, notes=(*found.notes, assumed))
    _show(found, out, as_json)


def _servers(family: Path | None, nodes: Path | None) -> tuple[Standing, ...]:
    """Where a family's servers stand; nowhere, where no machines are named."""
    if nodes is None:
        return ()
    if family is None:
        raise Refused("--nodes says where the servers of a family fit: give --family, too")
    from heliostat.serve.nodes import read
    from heliostat.serve.rendering import sized

    return sized(family, read(nodes)).standings


def _show_servers(
    servers: tuple[Standing, ...], machine: tuple[str | None, Path | None], out: Path | None, as_json: bool
) -> None:
    """The servers alone, where there is no log."""
    from dataclasses import asdict

    from heliostat.bench.plan_page import stands

    if not servers or machine != (None, None) or out is not None:
        raise Refused(
            "--logs FILE is missing: a plan is of a log; without one it tells where servers fit (--family and --nodes)"
        )
    if as_json:
        return print_json({"servers": [asdict(one) for one in servers]})
    title, heads, rows = stands(servers)
    print_table(rows, title=title, columns=heads)


def _show(found: Plan, out: Path | None, as_json: bool) -> None:
    from heliostat.bench.plan_page import enough, sentence, tables

    if out is not None:
        _write(out, found)
    if as_json:
        return print_json(found.to_json())
    print(sentence(found))
    for title, heads, rows in tables(found):
        print_table(rows, title=title, columns=heads)
    for line in found.notes:
        note(f"note: {line}")
    print(found.verdict)
    if found.fleet is not None:
        print(found.fleet.verdict)
    if said := enough(found):
        print(said)
    if out is not None:
        print(f"report: {out / 'report.html'}")


def _unused(**options: Any) -> str | None:
    """The first option that was given and belongs to a machine."""
    given = (name for name, value in options.items() if value != _USUAL[name])
    return next((f"--{name}" for name in given), None)


def _tokenizer(family: Path | None) -> Tokenize | None:
    if family is None:
        return None
    from heliostat.build import load_tokenizer, read_family

    tokenizer = load_tokenizer(family, read_family(family))

    def ids(asked: Any) -> list[int]:
        return tokenizer.plain_prompt_ids(asked) if isinstance(asked, str) else tokenizer.prompt_ids(asked)

    return ids


def _machine(
    gpu: str | None, costs: Path | None, model: str | None, family: Path | None
) -> tuple[Machine, str]:
    """What a worker runs on, and what is assumed of it."""
    from heliostat.bench.costs import read_costs
    from heliostat.bench.machines import assumptions, machine, measured_machine, model_named
    from heliostat.family import BASE
    from heliostat.model.config import read_config

    if costs is not None:
        if gpu is not None or model is not None:
            raise Refused("--costs is of a machine and a model: leave out --gpu and --model, or --costs")
        return measured_machine(
            read_costs(costs)
        ), f"steps take as long as {costs} says; memory is not reckoned"
    assert gpu is not None
    if model is None and family is not None:
        from heliostat.build import config_of, read_family

        config = config_of(family, read_family(family), BASE)
    elif model is not None and Path(model).exists():
        path = Path(model)
        if path.is_file() and path.name != "config.json":
            raise Refused(f"--model {path}: give a config.json, or the folder it lies in")
        config = read_config(path if path.is_dir() else path.parent)
    else:
        config = model_named(model or "8b")
    return machine(gpu, config), assumptions()


def _rows(family: Path | None, log: Log) -> Case | None:
    """The rows that the log's members have in a family, where it has all of them."""
    if family is None:
        return None
    from heliostat.bench.counting import OWN, Case
    from heliostat.build import read_family

    found = read_family(family)
    strange = [name for name in log.members if name not in {*found.members, *found.modules}]
    if strange:
        note(f"note: {', '.join(strange)}: no members of {family}, so its rows are not counted")
        return None
    weights = {m.name: m.weights for m in found.modules.values() if m.weights != m.name}
    return Case(OWN, {name: found.row(name) for name in log.members}, weights)


def _write(out: Path, found: Any) -> None:
    from heliostat.bench.birth import certificate
    from heliostat.bench.plan_page import write_report
    from heliostat.files import atomic_write_text

    birth = certificate(shlex.join(["heliostat", *sys.argv[1:]]))
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"birth": birth, **found.to_json()}, indent=1, allow_nan=False, default=str)
    atomic_write_text(out / "results.json", text + "\n")
    write_report(out / "report.html", found, birth)
