"""``heliostat inspect`` and ``check``: what a family is made of, and whether it is what it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliostat.cli.printing import Family, Json, percent, print_json, print_next, print_table
from heliostat.errors import Refused
from heliostat.family import PARTS, SHARINGS, choose
from heliostat.files import readable_size
from heliostat.tasks.grade import METRICS, METRICS_SHOWN

if TYPE_CHECKING:
    from heliostat.check import Finding
    from heliostat.survey import MemberFacts, Survey

_HEADS = tuple(part.replace("_", " ") for part in PARTS)  # a space is where a narrow terminal can break them


def inspect_family(family: Family, as_json: Json = False) -> None:
    """With the memory of as many separate models beside the family's."""
    from heliostat.build import read_family
    from heliostat.survey import survey

    found = survey(family, read_family(family))
    if as_json:
        return print_json(found.to_json())
    _show_modules(found)
    if not found.members:
        print("no members yet")
        return print_next([["train", family, "--member", "NAME", "--sharing", "sun", "--data", "DATA.jsonl"]])
    _show_members(found)
    rows = [(s.what, readable_size(s.separate), readable_size(s.family), s.why) for s in found.savings]
    models = f"{len(found.members)} separate model{'s' * (len(found.members) != 1)}"
    print_table(rows, title="Memory", columns=("of", models, "this family", "because"))


def _show_modules(found: Survey) -> None:
    rows = [
        (
            m.name,
            m.kind,
            f"{m.parameters:,}",
            readable_size(m.bytes),
            m.digest[:8],
            ", ".join(m.users) or "nobody",
        )
        for m in found.modules
    ]
    columns = ("module", "kind", "parameters", "size", "digest", "used by")
    print_table(rows, title=f"Modules of {found.folder}, {found.dtype}", columns=columns)


def _show_members(found: Survey) -> None:
    rows = [
        (m.name, m.sharing, *(getattr(m.row, part) for part in PARTS), _accuracy(m)) for m in found.members
    ]
    columns: tuple[str, ...] = ("member", "sharing", *_HEADS, "accuracy")
    print_table(rows, title="Members", columns=columns, whole=("sharing",))
    shared = [
        (
            m.name,
            *(_names(m.one_pass[part], found) for part in PARTS[:3]),
            _names(m.one_prompt, found),
            _names(m.one_cache, found),
        )
        for m in found.members
    ]
    columns = ("member", *_HEADS[:3], "prompts' K,V", "answers' K,V")
    print_table(
        shared, title="Shared with whom: one pass for both, and the same keys and values", columns=columns
    )


def _names(names: Sequence[str], found: Survey) -> str:
    """Names, or ``all`` where it is everybody else."""
    if len(names) > 2 and len(names) == len(found.members) - 1:
        return "all"
    return ", ".join(names) or "-"


def _accuracy(member: MemberFacts) -> str:
    facts = member.evaluation
    return f"{percent(facts['accuracy'])} ({facts['metric']})" if "accuracy" in facts else "-"


def check(
    family: Family,
    as_sharing: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="|".join(SHARINGS),
            help="Also say what a member would lose under this sharing, untrained.",
            show_default=False,
        ),
    ] = None,
    member: Annotated[
        list[str] | None,
        typer.Option(help="Only this member; may be given several times.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Held-out data for --as, jsonl.", show_default=False)
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help=f"With --data, also accuracy. {METRICS_SHOWN}.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Reads every byte again. Exit status 1 where something is not as it should be."""
    if as_sharing is not None:
        choose(as_sharing, SHARINGS, what="sharing")
    if metric is not None:
        choose(metric, METRICS, what="metric")
    if (data or metric) and as_sharing is None:
        raise Refused(f"--{'data' if data else 'metric'} is for --as SHARING, which is missing")
    from heliostat.check import check_family

    findings = []
    for finding in check_family(family, members=member or None, sharing=as_sharing, data=data, metric=metric):
        findings.append(finding)
        if not as_json:
            _show_finding(finding)
    ok = all(finding.ok for finding in findings)
    if as_json:
        rows: list[dict[str, Any]] = [{"name": f.name, "ok": f.ok, "text": f.text} for f in findings]
        print_json({"ok": ok, "findings": rows})
    if not ok:
        raise typer.Exit(1)


def _show_finding(finding: Finding) -> None:
    mark, colour = ("ok", "green") if finding.ok else ("NOT OK", "red")
    typer.secho(f"{mark:>6}  ", fg=colour, bold=not finding.ok, nl=False)
    typer.echo(f"{finding.name}: {finding.text}")
