"""``heliostat plan``: what a log of requests says about sharing, do not switch included."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliostat.cli.printing import Json, note, print_json, print_table

if TYPE_CHECKING:
    from heliostat.bench.counting import Case
    from heliostat.bench.logs import Log, Tokenize


def plan(
    logs: Annotated[
        Path, typer.Option(help="jsonl, one request a line; docs/measuring.md says what.", show_default=False)
    ],
    family: Annotated[
        Path | None,
        typer.Option(help="Its tokenizer counts texts, and its rows are counted too.", show_default=False),
    ] = None,
    page_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a page.")] = 16,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out lines that are no request.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.json and report.html.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Counts what prompts have in common, within and across members, and what each sharing would save of it."""
    from heliostat.bench.logs import read_log
    from heliostat.bench.plan_page import sentence, tables
    from heliostat.bench.planning import plan as look

    log = read_log(logs, tokenize=_tokenizer(family), skip_bad=skip_bad)
    found = look(log, own=_rows(family, log), size=page_tokens)
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
    if out is not None:
        print(f"report: {out / 'report.html'}")


def _tokenizer(family: Path | None) -> Tokenize | None:
    if family is None:
        return None
    from heliostat.build import load_tokenizer, read_family

    tokenizer = load_tokenizer(family, read_family(family))

    def ids(asked: Any) -> list[int]:
        return tokenizer.plain_prompt_ids(asked) if isinstance(asked, str) else tokenizer.prompt_ids(asked)

    return ids


def _rows(family: Path | None, log: Log) -> Case | None:
    """The rows that the log's members have in a family, where it has all of them."""
    if family is None:
        return None
    from heliostat.bench.counting import Case
    from heliostat.build import read_family

    found = read_family(family)
    strange = [name for name in log.members if name not in {*found.members, *found.modules}]
    if strange:
        note(f"note: {', '.join(strange)}: no members of {family}, so its rows are not counted")
        return None
    weights = {module.name: module.weights for module in found.modules.values()}
    return Case("this family", {name: found.row(name) for name in log.members}, weights)


def _write(out: Path, found: Any) -> None:
    from heliostat.bench.birth import certificate
    from heliostat.bench.plan_page import write_report
    from heliostat.files import atomic_write_text

    birth = certificate(shlex.join(["heliostat", *sys.argv[1:]]))
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"birth": birth, **found.to_json()}, indent=1, allow_nan=False, default=str)
    atomic_write_text(out / "results.json", text + "\n")
    write_report(out / "report.html", found, birth)
