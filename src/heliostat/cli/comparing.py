"""``heliostat bench workflow`` and ``decode``: ways of sharing side by side in one engine, on the cores of this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from heliostat.bench.comparison import LIMITS, LOAD, LOADS, NO_HELP, Comparison, Variant, quick
from heliostat.bench.records import Limits
from heliostat.bench.systems import counts, member_names, systems_named
from heliostat.bench.workloads import Lengths, Load, popularity_named
from heliostat.cli.failing import stop
from heliostat.cli.options import given, options_of, taking
from heliostat.cli.printing import Json, note, print_json, print_table
from heliostat.errors import Refused

Members = Annotated[str, typer.Option(help="How many, or several comparisons: 2,4,8")]
Compare = Annotated[str, typer.Option(help="Systems; the first is the baseline of all others.")]
Shape = Annotated[str, typer.Option(help="Of the random weights: 24M or 100M.")]
Popularity = Annotated[str, typer.Option(help="uniform, or zipf:S over the members in their order.")]
Loads = Annotated[
    str,
    typer.Option(help="Parts of the baseline's peak.", show_default="0.5,0.8,1,1.2; of several members 1"),
]
Pools = Annotated[
    str, typer.Option(help="Size of the cache: tight, even, roomy; those after the first are swept.")
]
Switches = Annotated[
    str, typer.Option(help="How often the member changes, 0 to 1; those after the first are swept.")
]
Popularities = Annotated[
    str, typer.Option(help="uniform, zipf:S, of several members; those after the first are swept.")
]
Seed = Annotated[int, typer.Option(help="Of sessions and weights.")]
POPULARITIES, RUNNING = "uniform,zipf:1.2", "1,2,3,4"
"""What `bench decode` measures by itself; a quick run takes the first of each."""
Quick = Annotated[bool, typer.Option("--quick", help="A minute, no 95th percentiles.")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for points and results; what is there goes on.", show_default="out/bench/ and the name"
    ),
]
Name = Annotated[
    str, typer.Option(help="Of the page in --docs.", show_default="workflow- and what is measured")
]
Docs = Annotated[
    Path | None, typer.Option(help="Also write the page, its numbers and pictures here.", show_default="no")
]
_OWN = ("members", "rate", "lengths", "popularity", "switch", "seed")


@taking(
    options_of(Load, without=_OWN, like=LOAD),
    options_of(Lengths, like=LOAD.lengths),
    options_of(Limits, without=("timeout",), like=LIMITS),
)
def workflow(
    members: Members = "4",
    compare: Compare = "independent,multilora,icarus",
    shape: Shape = "24M",
    loads: Loads = "",
    pools: Pools = "even",
    switches: Switches = "1",
    popularity: Popularities = "uniform",
    seed: Seed = 0,
    quick_run: Quick = False,
    out: Out = None,
    docs: Docs = None,
    name: Name = "",
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Sessions of several members over one growing context, under several ways of sharing.

    Every system is the same engine with random weights, on the same cores, with as many pages.

    Ctrl-C keeps what was measured; the same command goes on from there.
    """
    sweep, typed = _swept(pools, switches, popularity), given(flags)
    _refuse_unused(members, sweep, loads, typed, quick_run=quick_run)
    wanted = _comparisons(members, compare, sweep, loads, typed, shape=shape, seed=seed)
    wanted = [quick(each) for each in wanted] if quick_run else wanted
    usual = f"workflow-{wanted[0].load.workflow}" + ("-members" if len(wanted) > 1 else "")
    _measured(wanted, name or usual, out, docs, as_json=as_json)


def _refuse_unused(
    members: str,
    sweep: tuple[Variant, Sequence[Variant]],
    loads: str,
    typed: Mapping[str, Any],
    *,
    quick_run: bool,
) -> None:
    """Refuse options that would decide nothing beside others."""
    fixed, swept = sweep
    if quick_run and (loads or swept or "sessions" in typed):
        raise Refused(
            "--quick has a load and a number of sessions of its own, and sweeps nothing: leave those options out"
        )
    if swept and len(counts(members)) > 1:
        raise Refused("several --members and several --pools, --switches or --popularity: sweep one of them")
    if fixed.load["popularity"] and typed.get("assignment", "draw") != "draw":
        raise Refused(
            f"--assignment {typed['assignment']} gives members turns, so --popularity says nothing: take draw"
        )


def _comparisons(
    members: str,
    compare: str,
    sweep: tuple[Variant, Sequence[Variant]],
    loads: str,
    typed: Mapping[str, Any],
    *,
    shape: str,
    seed: int,
) -> list[Comparison]:
    """One for each number of members; of several numbers only their peaks, and the baseline's peak load."""
    sizes, systems = counts(members), systems_named(compare)
    first, swept = sweep
    facts = {**first.load, **_of(Load, typed)}
    lengths, limits = replace(LOAD.lengths, **_of(Lengths, typed)), replace(LIMITS, **_of(Limits, typed))
    some = _floats(loads, "loads") if loads else [1.0] if len(sizes) > 1 else LOADS
    return [
        Comparison(
            systems=tuple(systems),
            load=replace(LOAD, members=member_names(count), seed=seed, lengths=lengths, **facts),
            shape=shape,
            pool=first.pool or "even",
            loads=tuple(some),
            limits=limits,
            variants=() if len(sizes) > 1 else (*NO_HELP, *swept),
        )
        for count in sizes
    ]


def _of(kind: type[Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that are fields of a dataclass."""
    return {field.name: typed[field.name] for field in fields(kind) if field.name in typed}


def decode(
    members: Members = "4",
    compare: Compare = "independent,multilora,sun",
    popularity: Annotated[str, typer.Option(help="uniform, zipf:S, or several.")] = POPULARITIES,
    running: Annotated[str, typer.Option(help="Requests a member, on average.")] = RUNNING,
    shape: Shape = "100M",
    rounds: Annotated[int, typer.Option(help="Made in turns; 5 for a ratio.")] = 5,
    seed: Seed = 0,
    quick_run: Quick = False,
    out: Out = None,
    docs: Docs = None,
    as_json: Json = False,
) -> None:
    """Tokens a second of several members that answer at once, under several ways of sharing.

    Prompts are read before the clock starts; every step that is timed gives each request a token.

    Ctrl-C keeps what was measured; the same command goes on from there.
    """
    from heliostat.bench.decoded import cases
    from heliostat.bench.decoded_page import cells, write_docs, write_report
    from heliostat.bench.decoding import Decoding, run_all

    sizes, systems = counts(members), systems_named(compare)
    each = counts(running, "running")
    names = [name.strip() for name in popularity.split(",")]
    for name in names:
        popularity_named(name)
    listed = {"members": members, "popularity": popularity, "running": running}
    for option, text in listed.items():
        if quick_run and "," in text and text not in (POPULARITIES, RUNNING):
            raise Refused(
                f"--quick measures one case, and {option} is {text!r}: give one value, or leave --quick out"
            )
    if rounds < 1:
        raise Refused(f"rounds is {rounds}; it must be at least 1")
    folder = out or Path("out/bench/decode-members")
    made = cases(sizes, names, each) if not quick_run else cases(sizes[:1], names[:1], each[:1])[:1]
    command = shlex.join(["heliostat", *sys.argv[1:]])
    asked = Decoding(tuple(systems), tuple(made), shape, rounds, seed)
    with _Progress(silent=as_json) as tell:
        results = run_all(asked, folder, command=command, tell=tell)
    write_report(folder / "report.html", results)
    if docs and not results["stopped"]:
        write_docs(docs, "decode-members", results)
    if as_json:
        print_json(results)
    else:
        heads, rows = cells(results)
        print_table(rows, title=results["what"], columns=heads)
    _end(results, folder, as_json=as_json)


def _end(results: Mapping[str, Any], folder: Path, *, as_json: bool) -> None:
    if not as_json:
        print(f"report: {folder / 'report.html'}")
    if results["stopped"]:
        stop(f"stopped; what was measured is in {folder}, and the same command goes on from there")


def _floats(text: str, name: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise Refused(f"{name} is {text!r}; it must be numbers with commas between: 1,0.5") from None


def _swept(pools: str, switches: str, popularity: str) -> tuple[Variant, list[Variant]]:
    """What is fixed, and what is changed one by one."""
    some = _floats(switches, "switches")
    skews = {name: popularity_named(name) for name in popularity.split(",")}
    wanted = pools.split(",")
    fixed: dict[str, Any] = {"switch": some[0], "popularity": next(iter(skews.values()))}
    swept = [
        *(Variant(f"pool {pool}", pool=pool) for pool in wanted[1:]),
        *(Variant(f"switching {switch:g}", {"switch": switch}) for switch in some[1:]),
        # Whose turn it is comes by drawing, where members are not alike.
        *(
            Variant(f"popularity {name}", {"popularity": skew, "assignment": "draw"})
            for name, skew in list(skews.items())[1:]
        ),
    ]
    if fixed["popularity"]:
        fixed["assignment"] = "draw"
    return Variant("", fixed, pool=wanted[0]), swept


def _measured(
    comparisons: Sequence[Comparison], name: str, out: Path | None, docs: Path | None, *, as_json: bool
) -> None:
    from heliostat.bench.compared_page import load_cells, peak_cells, warnings, write_docs, write_report
    from heliostat.bench.comparing import run_all

    folder = out or Path("out/bench") / name
    command = shlex.join(["heliostat", *sys.argv[1:]])
    with _Progress(silent=as_json) as tell:
        results = run_all(comparisons, folder, command=command, tell=tell)
    write_report(folder / "report.html", results)
    if as_json:
        print_json(results)
    for found in [] if as_json else results["comparisons"]:
        for cells, title in ((peak_cells(found), "peaks"), (load_cells(found), "loads")):
            if cells[1]:
                heads, rows = cells
                print_table(
                    [row[:-1] for row in rows],
                    title=f"{found['members']} members: {title}",
                    columns=heads[:-1],
                )
    for line in [] if as_json else warnings(results):
        note(f"note: {line}")
    if docs and not results["stopped"]:
        write_docs(docs, name, results)
    _end(results, folder, as_json=as_json)


class _Progress:
    """A bar over the points, with the name of the one that is being measured."""

    def __init__(self, *, silent: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=silent)
        self._task: Any = None

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, points: int, seconds: float) -> None:
        """So many points are still to be measured, which takes about so long."""
        note(f"{points} points, about {seconds / 60:.1f} minutes")
        self._task, self._over = self._bar.add_task("", total=points), -1

    def point(self, name: str) -> None:
        """This one begins."""
        self._over += 1
        self._bar.update(self._task, description=name, completed=self._over)
