"""Measures a server that runs somewhere: one run after the other, then results.json and report.html.

``requests.jsonl`` grows while it measures, so that nothing is lost that was measured.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from heliostat.bench.birth import certificate
from heliostat.bench.client import Client, Manner
from heliostat.bench.driving import Passing, drive
from heliostat.bench.measured import ceilings, summary
from heliostat.bench.measured_page import write_report
from heliostat.bench.records import Limits, Record, Run
from heliostat.bench.workloads import Session
from heliostat.errors import Refused
from heliostat.family import choose
from heliostat.files import atomic_write_text

APART = 7919
"""Between the seeds of two runs: no run finds what the one before it left in a cache."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One run that is to be made."""

    rate: float | None
    sessions: Sequence[Session]

    @property
    def calls(self) -> int:
        return sum(len(session.calls) for session in self.sessions)


@dataclass(frozen=True, slots=True)
class Job:
    """A measurement as a whole."""

    command: str
    load: Mapping[str, Any]
    """What was asked for, in plain values."""
    members: Sequence[str]
    runs: Sequence[Planned]
    manner: Manner
    passing: Passing
    limits: Limits
    out: Path


def found_members(manner: Manner, wanted: Sequence[str]) -> list[str]:
    """The members to ask: those wanted, or all but the base that the server tells. Refused where one is not there."""

    async def ask() -> list[str] | None:
        async with Client(manner) as client:
            return await client.members()

    there = asyncio.run(ask())
    if there is None:
        if not wanted:
            raise Refused(f"{manner.url} does not list its models: say whom to ask with --members")
        return list(wanted)
    for name in wanted:
        choose(name.partition("@")[0], dict.fromkeys(there), what="member")
    return list(wanted) or [name for name in there if name != "base"] or there


def measure(job: Job, *, tell: Callable[[Run, Record], None] = lambda run, record: None) -> dict[str, Any]:
    """Make all runs and write the results; also what there is of them after Ctrl-C (``stopped`` is then true)."""
    job.out.mkdir(parents=True, exist_ok=True)
    runs = [Run(number, planned.rate) for number, planned in enumerate(job.runs)]
    with (job.out / "requests.jsonl").open("w", encoding="utf-8") as file:

        def keep(run: Run, record: Record) -> None:
            file.write(record.line())
            file.flush()
            tell(run, record)

        asyncio.run(_all(job, runs, keep))
    made = [run for run in runs if run.records]
    results = {
        "birth": certificate(job.command, seed=job.load.get("seed"), repeats=1),
        "load": dict(job.load),
        "url": job.manner.url,
        "members": list(job.members),
        "limits": asdict(job.limits),
        "stopped": any(run.stopped for run in runs),
        "runs": [summary(run, job.limits) for run in made],
        "ceilings": [ceilings(planned.sessions, job.members) for planned in job.runs[: len(made)]],
    }
    atomic_write_text(job.out / "results.json", json.dumps(results, indent=1) + "\n")
    write_report(job.out / "report.html", results)
    return results


async def _all(job: Job, runs: Sequence[Run], keep: Callable[[Run, Record], None]) -> None:
    async with Client(job.manner) as client:
        for run, planned in zip(runs, job.runs, strict=True):
            await drive(
                planned.sessions,
                client.ask,
                run=run,
                passing=job.passing,
                tell=partial(keep, run),
            )
            if run.stopped:
                return
