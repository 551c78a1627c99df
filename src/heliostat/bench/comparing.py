"""Runs a comparison: every system takes the same sessions, one system after another, on the same cores.

A point (one system, one load) is kept in a file of its own as soon as it is there; what is there is not run again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from heliostat.bench.birth import certificate
from heliostat.bench.compared import (
    LOADED,
    PEAK,
    PILOTS,
    TRIED,
    able_caps,
    best_cap,
    best_pilot,
    compared,
    key,
    peak,
)
from heliostat.bench.comparison import Comparison, Variant
from heliostat.bench.driving import Passing, drive
from heliostat.bench.measured import summary
from heliostat.bench.records import Run
from heliostat.bench.seated import Gate, Seated, Timesheet
from heliostat.bench.stand import Stand
from heliostat.bench.systems import System, rank
from heliostat.bench.workloads import Session
from heliostat.errors import Refused
from heliostat.files import atomic_write_text, read_json


class Tell(Protocol):
    """Hears how a comparison goes on."""

    def begin(self, points: int, seconds: float) -> None:
        """So many points are still to be measured, which takes about so long."""

    def point(self, name: str) -> None:
        """This one begins."""


class Silent:
    """Tells nobody."""

    def begin(self, points: int, seconds: float) -> None:
        """Nothing."""

    def point(self, name: str) -> None:
        """Nothing."""


class Kept:
    """Points on disk. Raises Refused where the folder holds those of another comparison."""

    def __init__(self, folder: Path, asked: Mapping[str, Any]) -> None:
        """``asked``: all that decides the numbers, the commit among it."""
        self.folder = folder / "points"
        note, wanted = folder / "asked.json", json.loads(json.dumps(asked))
        if note.exists() and read_json(note) != wanted:
            raise Refused(
                f"{folder} holds another comparison, or one of another commit, machine or number of threads: take another "
                "folder with --out"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(note, json.dumps(wanted, indent=1) + "\n")
        self.found: dict[str, Any] = {path.stem: read_json(path) for path in self.folder.glob("*.json")}

    def get(self, name: str, make: Callable[[], Mapping[str, Any]], tell: Tell) -> Mapping[str, Any]:
        """The point of that name: as it was measured before, or now."""
        if name not in self.found:
            tell.point(name)
            made = make()
            atomic_write_text(self.folder / f"{name}.json", json.dumps(made, indent=1) + "\n")
            self.found[name] = made
        found: Mapping[str, Any] = self.found[name]
        return found


class Comparing:
    """One comparison on its way. Ctrl-C ends it as KeyboardInterrupt; whole points are kept, half ones are not."""

    def __init__(self, comparison: Comparison, stand: Stand, kept: Kept, *, tell: Tell) -> None:
        self.it, self.stand, self.kept, self.tell = comparison, stand, kept, tell
        self.pages = {variant.name: comparison.changed(variant).pages() for variant in comparison.variants}
        self.pages[""] = comparison.pages()

    def estimate(self) -> float:
        """Seconds that all points take, from a short run of the baseline that counts for nothing."""
        it = self.it
        run, _ = self._run(it.baseline, it.at_once(900, 8), cap=8, pages=self.pages[""])
        return it.seconds(max(end for _, end in run.spans.values()) / len(run.spans))

    def all(self) -> None:
        """Caps, peaks, loads, variants: in this order, so that what matters most is there first."""
        it = self.it
        here = key(it, "")
        if missing := it.points - sum(name.startswith(here) for name in self.kept.found):
            self.tell.begin(missing, self.estimate() * missing / it.points)
        tried = it.at_once(1, it.varied)
        for system in it.systems:
            for cap in it.caps:
                self._closed(key(it, TRIED, system.name, cap), system, tried, cap)
        self._peaks(None)
        for number, load in enumerate(it.loads):
            self._loaded(load, 100 + 10 * number)
        for variant in it.variants:
            self._peaks(variant)

    def said(self) -> dict[str, Any]:
        """What the points that are there allow to be said."""
        it, members = self.it, self.it.load.members
        memory = {system.name: self.stand.bytes(system, members) for system in it.systems}
        found = compared(it, self.kept.found, pages=self.pages[""], memory=memory)
        return {**found, "adapter_rank": rank(self.stand.config.width)}

    def _peaks(self, variant: Variant | None) -> None:
        """In turns, each round beginning with another system."""
        it = self.it
        caps = {system.name: best_cap(it, self.kept.found, system.name) for system in it.systems}
        changed, how_many = (it, it.saturated) if variant is None else (it.changed(variant), it.varied)
        for number in range(it.rounds):
            made = changed.at_once(10 + number, how_many)
            turn = number % len(it.systems)
            for system in (*it.systems[turn:], *it.systems[:turn]):
                name = key(it, PEAK, variant.name if variant else "", system.name, number)
                self._closed(name, system, made, caps[system.name], variant)

    def _closed(
        self, name: str, system: System, made: Sequence[Session], cap: int, variant: Variant | None = None
    ) -> None:
        """As many sessions at a time as the cap says, all of them due at once."""
        pages = self.pages["" if variant is None else variant.name]

        def make() -> Mapping[str, Any]:
            run, sheet = self._run(system, made, cap=cap, pages=pages)
            said = summary(run, self.it.limits)
            return {
                "cap": cap,
                "sessions": len(run.spans),
                "sessions_a_second": len(run.spans) / max(end for _, end in run.spans.values()),
                "hits": said["hits"],
                "sheet": asdict(sheet),
                "shares": sheet.shares(run.lateness.wall),
            }

        self.kept.get(name, make, self.tell)

    def _loaded(self, load: float, number: int) -> None:
        """One load: the baseline's best cap there first, then every system over the same sessions."""
        it = self.it
        rate = load * peak(it, self.kept.found)
        if it.pilot:
            self._pilots(load, number + 5, rate)
        for system in it.systems:
            cap = best_cap(it, self.kept.found, system.name)
            if it.pilot and system is it.baseline:
                cap = best_pilot(it, self.kept.found, load)
            name = key(it, LOADED, load, system.name)
            self._open(name, system, it.sessions(number, rate=rate), cap, rate)

    def _pilots(self, load: float, number: int, rate: float) -> None:
        """The baseline with every cap that can carry this load at all: few sessions would not show that it cannot."""
        it = self.it
        made = it.sessions(number, rate=rate, how_many=it.pilot)
        able = able_caps(it, self.kept.found, rate)
        for cap in it.caps:
            name = key(it, PILOTS, load, cap)
            if cap in able:
                self._open(name, it.baseline, made, cap, rate)
            else:
                self.kept.get(name, dict, self.tell)

    def _open(self, name: str, system: System, made: Sequence[Session], cap: int, rate: float) -> None:
        def make() -> Mapping[str, Any]:
            run, sheet = self._run(system, made, cap=cap, pages=self.pages[""], rate=rate)
            return {
                "cap": cap,
                "rate": rate,
                "summary": summary(run, self.it.limits),
                "spans": {str(number): span for number, span in run.spans.items()},
                "sheet": asdict(sheet),
                "shares": sheet.shares(run.lateness.wall),
            }

        self.kept.get(name, make, self.tell)

    def _run(
        self, system: System, made: Sequence[Session], *, cap: int, pages: int, rate: float | None = None
    ) -> tuple[Run, Timesheet]:
        members = self.it.load.members
        engine = self.stand.engine(system, members, pages=pages)
        run = Run(0, rate)
        sheet = asyncio.run(driven(Seated(engine, system.rows(members), Gate(cap, made)), made, run))
        if run.stopped:
            raise KeyboardInterrupt
        if failed := [record for record in run.records if not record.answered]:
            raise Refused(f"{system.name}: {len(failed)} requests failed, the first with: {failed[0].told}")
        return run, sheet


def run_all(comparisons: Sequence[Comparison], folder: Path, *, command: str, tell: Tell) -> dict[str, Any]:
    """All comparisons, and results.json; after Ctrl-C what there is of them (``stopped`` is then true)."""
    first = comparisons[0]
    stand = Stand(first.shape, seed=first.load.seed)
    _refuse_too_long(comparisons, stand.config.max_length)
    birth = certificate(command, seed=first.load.seed, repeats=first.rounds)
    asked = {**decisive(birth), "comparisons": [asdict(each) for each in comparisons]}
    kept, made, stopped = Kept(folder, asked), [], False
    for each in comparisons:
        made.append(comparing := Comparing(each, stand, kept, tell=tell))
        try:
            comparing.all()
        except KeyboardInterrupt:
            stopped = True
            break
    results = {
        "birth": birth,
        "what": f"workflow, {first.load.workflow}",
        "stopped": stopped,
        "comparisons": [comparing.said() for comparing in made],
    }
    atomic_write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def decisive(birth: Mapping[str, Any]) -> dict[str, Any]:
    """What of a certificate decides the numbers: points of another cannot stand beside each other."""
    return {name: birth[name] for name in ("commit", "hardware", "threads", "versions")}


def _refuse_too_long(comparisons: Sequence[Comparison], most: int) -> None:
    for each in comparisons:
        if (longest := each.longest()) > 0.9 * most:
            raise Refused(
                f"requests have up to {longest} tokens or a little more; shape {each.shape} runs {most}: "
                "shorten --context, --answer or --observation, or take fewer --turns"
            )


async def driven(seated: Seated, made: Sequence[Session], run: Run) -> Timesheet:
    """All sessions through an engine in this process; returns where its time went."""
    stepping = asyncio.create_task(seated.run())
    try:
        await drive(made, seated.ask, run=run, passing=Passing(as_ids=True))
    finally:
        stepping.cancel()
        await asyncio.gather(stepping, return_exceptions=True)
    return seated.sheet
