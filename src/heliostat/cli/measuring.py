"""``heliostat bench client`` and ``replay``: measure a server that runs, with members over one context or with a trace."""

from __future__ import annotations

import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heliostat.bench.records import Limits
from heliostat.bench.traces import Replay
from heliostat.bench.workloads import Lengths, Load, popularity_named, respelled, sessions
from heliostat.cli.failing import stop
from heliostat.cli.options import given, options_of, taking
from heliostat.cli.printing import Json, note, print_json, print_table
from heliostat.errors import Refused

if TYPE_CHECKING:
    from heliostat.bench.measure import Job, Planned
    from heliostat.bench.records import Record, Run

Url = Annotated[
    str, typer.Option(help="Of any OpenAI server, with /v1: http://127.0.0.1:8000/v1", show_default=False)
]
Members = Annotated[
    str,
    typer.Option(
        help="Names, with commas; default: all that the server lists, but base.", show_default=False
    ),
]
Rates = Annotated[str, typer.Option(help="Sessions a second, one run each: 0.5,1,2")]
Speeds = Annotated[str, typer.Option(help="How many times as fast as it was, one run each: 1,2")]
Popularity = Annotated[str, typer.Option(help="uniform, or zipf:S over the members in their order.")]
PassAs = Annotated[
    str,
    typer.Option(help="text, to chat completions; or ids, to completions, where weights are random."),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="Send only fields of the official dialect (no ignore_eos).")
]
Keep = Annotated[
    bool,
    typer.Option("--keep-prompts", help="Keep prompts and answers in requests.jsonl, for heliostat plan."),
]
Nonce = Annotated[
    str | None,
    typer.Option(
        help="Spells the same sessions in other tokens, so that no cache has met them.",
        show_default="a new one",
    ),
]
KeyEnv = Annotated[
    str | None,
    typer.Option(help="Environment variable that holds the API key.", show_default="no key is sent"),
]
Out = Annotated[
    Path | None, typer.Option(help="Folder for the results.", show_default="out/bench/ and the time")
]


@taking(
    options_of(Load, without=("members", "rate", "lengths", "popularity")),
    options_of(Lengths),
    options_of(Limits),
)
def client(
    url: Url,
    members: Members = "",
    rate: Rates = "1",
    popularity: Popularity = "uniform",
    pass_as: PassAs = "text",
    plain: Plain = False,
    keep_prompts: Keep = False,
    nonce: Nonce = None,
    key_env: KeyEnv = None,
    out: Out = None,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Sessions of several members over one context.

    Workflows are react, reflexion and fanout; the context grows.

    Ctrl-C ends it and keeps what was measured.
    """
    from heliostat.bench.measure import APART, Planned

    facts, lengths, limits = _split(given(flags), Load, Lengths, Limits)
    rates = _numbers(rate, "rate")
    base = Load(members=("-",), popularity=popularity_named(popularity), lengths=Lengths(**lengths), **facts)
    asked = _Asked(url, key_env, Limits(**limits), pass_as, plain, keep_prompts, out, base.seed, nonce)
    load = replace(base, members=tuple(asked.members(members)))

    def runs() -> list[Planned]:
        loads = [replace(load, rate=r, seed=load.seed + APART * n) for n, r in enumerate(rates)]
        return [Planned(each.rate, sessions(each)) for each in loads]

    told = {"what": f"client, {load.workflow}", **asdict(load), "rate": rates}
    asked.measure(load.members, runs(), told, as_json=as_json)


@taking(options_of(Replay, without=("members", "speed", "popularity")), options_of(Limits))
def replay(
    url: Url,
    trace: Annotated[Path, typer.Option(help="Mooncake's jsonl, or Azure's LLM csv.", show_default=False)],
    members: Members = "",
    speed: Speeds = "1",
    popularity: Popularity = "uniform",
    pass_as: PassAs = "text",
    plain: Plain = False,
    keep_prompts: Keep = False,
    nonce: Nonce = None,
    key_env: KeyEnv = None,
    out: Out = None,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """A public trace, given to members.

    What begins alike in the trace begins alike here.

    Ctrl-C ends it and keeps what was measured.
    """
    from heliostat.bench.measure import APART, Planned
    from heliostat.bench.traces import read_trace, replayed

    facts, limits = _split(given(flags), Replay, Limits)
    found = read_trace(trace)
    base = Replay(members=("-",), popularity=popularity_named(popularity), **facts)
    asked = _Asked(url, key_env, Limits(**limits), pass_as, plain, keep_prompts, out, base.seed, nonce)
    how = replace(base, members=tuple(asked.members(members)))
    runs, left_out = [], 0
    for number, times in enumerate(_numbers(speed, "speed")):
        made, left_out = replayed(found, replace(how, speed=times, seed=how.seed + APART * number))
        runs.append(Planned(None, made))
    if left_out:
        note(f"{left_out} requests are longer than {how.max_length} tokens and are left out")
    told = {"what": f"replay, {trace.name}", **asdict(how), "speed": speed, "left_out": left_out}
    asked.measure(how.members, runs, told, as_json=as_json)


class _Asked:
    """What both commands are told alike."""

    def __init__(
        self,
        url: str,
        key_env: str | None,
        limits: Limits,
        pass_as: str,
        plain: bool,
        keep_prompts: bool,
        out: Path | None,
        seed: int,
        nonce: str | None,
    ) -> None:
        from heliostat.bench.client import Manner
        from heliostat.bench.driving import Passing

        if pass_as not in ("text", "ids"):
            raise Refused(f"pass-as is {pass_as!r}; allowed is text, ids")
        self.limits = limits
        self.nonce = nonce or secrets.token_hex(4)
        self.manner = Manner(url, _key(key_env), plain, limits.timeout, seed=seed)
        self.passing = Passing(pass_as == "ids", keep_prompts)
        self.out = out or Path("out/bench") / time.strftime("%Y%m%d-%H%M%S")

    def members(self, names: str) -> list[str]:
        """Whom to ask: names that the server knows."""
        from heliostat.bench.measure import found_members

        return found_members(self.manner, [name.strip() for name in names.split(",") if name.strip()])

    def measure(
        self, members: Sequence[str], runs: Sequence[Planned], told: Mapping[str, Any], *, as_json: bool
    ) -> None:
        """Run all, write the results and show them."""
        from heliostat.bench.measure import Job, measure

        command = shlex.join(["heliostat", *sys.argv[1:]])
        facts = {
            **told,
            "nonce": self.nonce,
            "pass_as": "ids" if self.passing.as_ids else "text",
            "plain": self.manner.plain,
        }
        runs = [replace(planned, sessions=respelled(planned.sessions, self.nonce)) for planned in runs]
        job = Job(command, facts, members, runs, self.manner, self.passing, self.limits, self.out)
        with _Progress(job, silent=as_json) as tell:
            results = measure(job, tell=tell)
        if as_json:
            print_json(results)
        else:
            _show(results)
            print(f"report: {self.out / 'report.html'}")
        if results["stopped"]:
            stop(f"stopped; what was measured is in {self.out}")


def _key(variable: str | None) -> str | None:
    """The API key, never part of a command line or a file; only where it was asked for is one sent."""
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise Refused(f"the environment variable {variable} of --key-env is not set")
    return key


def _split(flags: Mapping[str, Any], *kinds: type[Any]) -> list[dict[str, Any]]:
    """The options of each dataclass."""
    return [
        {field.name: flags[field.name] for field in fields(kind) if field.name in flags} for kind in kinds
    ]


def _numbers(text: str, name: str) -> list[float]:
    """``0.5,1,2`` as numbers above 0."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0 or max(found) > 1e6:
        raise Refused(f"{name} is {text!r}; it must be numbers above 0 with commas between: 0.5,1,2")
    return found


class _Progress:
    """A bar with what was answered, met and failed so far; nothing where nobody looks."""

    def __init__(self, job: Job, *, silent: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(
            *columns, TextColumn("{task.fields[told]}"), console=Console(stderr=True), disable=silent
        )
        self._job = job
        self._tasks = [
            self._bar.add_task(f"run {n + 1}", total=planned.calls, told="", visible=not n)
            for n, planned in enumerate(job.runs)
        ]
        self._met, self._failed = 0, 0
        self._run = 0

    def __enter__(self) -> Callable[[Run, Record], None]:
        self._bar.start()
        return self._tell

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _tell(self, run: Run, record: Record) -> None:
        if run.number != self._run:
            self._run, self._met, self._failed = run.number, 0, 0
        self._met += record.meets(self._job.limits)
        self._failed += not record.answered
        told = f"{self._met} within limits, {self._failed} failed"
        self._bar.update(self._tasks[run.number], advance=1, told=told, visible=True)


def _show(results: Mapping[str, Any]) -> None:
    from heliostat.bench.measured_page import overview, warnings

    runs = [run for run in results["runs"] if run["requests"]["due"]]
    heads, rows = overview(runs, intervals=False)
    print_table(rows, title=f"{results['url']}: {results['load']['what']}", columns=heads)
    for line in warnings(results, runs):
        note(f"note: {line}")
