"""Workers that are started, held to what they should be, started again, and given up; on counted time."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from heliostat.clock import run_virtual
from heliostat.errors import Refused
from heliostat.serve.cluster import Cluster, Place
from heliostat.serve.dispatch import Dispatcher
from heliostat.serve.log import Log
from heliostat.serve.metrics import Metrics
from heliostat.serve.protocol import Described
from heliostat.serve.supervisor import LAST_WORDS, LONGEST_PAUSE, MOST_QUICK, QUICK, READY_SECONDS, Supervisor

PLACES = (
    Place(name="p", roles=("prefill",), modules=("base", "own")),
    Place(name="d", roles=("decode",), modules=("base",)),
)
DIGESTS = {"base": "b" * 64, "own": "0" * 64}


class Idle:
    """A worker that says what it is, and is asked for nothing."""

    def __init__(self, described: Described) -> None:
        self.described, self.closed = described, False

    async def describe(self) -> Described:
        return self.described

    async def close(self) -> None:
        self.closed = True


@dataclass
class Process:
    """As ``supervisor.Running``."""

    worker: Any
    stubborn: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)
    how: str = ""
    number: int = 0
    held: bool = True
    """Whether something of it is left here: ``ended`` gives it up."""

    async def ended(self) -> str:
        await self.over.wait()
        self.held = False
        return self.how

    def dies(self, how: str) -> None:
        self.how = how
        self.over.set()

    async def end(self) -> None:
        await self.worker.close()
        if not self.stubborn:
            self.dies("dismissed")
        await self.over.wait()

    def kill(self) -> None:
        self.dies(self.how or "killed")


def describe(place: Place, hosted: Mapping[str, str], **more: Any) -> Described:
    facts = {
        "worker": place.name,
        "incarnation": "1",
        "modules": {f"{name}#{digest[:12]}": f"{digest}/float32" for name, digest in hosted.items()},
        "roles": place.roles,
        "fit": "fit",
        "page_size": 16,
        "dtype": "float32",
        "pages": 8,
        "page_bytes": 8,
        "max_length": 64,
        "max_running": 4,
        "credit": 2,
        "hands": True,
    }
    return Described(**{**facts, **more})


@dataclass
class Machine:
    """Starts processes, and remembers them and when."""

    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    refuses: bool = False
    short: int = 0
    """How often there is no process to be had."""
    loads: float = 1
    """Seconds until one is ready."""
    away: set[str] = field(default_factory=set)
    """Places where nobody answers."""
    started: list[tuple[float, Process]] = field(default_factory=list)
    swept: int = 0

    async def __call__(self, place: Place, modules: Mapping[str, str]) -> Process:
        await asyncio.sleep(self.loads)
        while place.name in self.away:
            await asyncio.sleep(1)
        if self.short:
            self.short -= 1
            raise BlockingIOError("no more processes")
        if self.refuses:
            raise ConnectionError("ended with status 2")
        process = Process(Idle(describe(place, modules, **self.changes.get(place.name, {}))))
        self.started.append((asyncio.get_running_loop().time(), process))
        return process

    def sweep(self) -> None:
        self.swept += 1

    def latest(self, name: str) -> Process:
        return next(p for _, p in reversed(self.started) if p.worker.described.worker == name)


def supervised(machine: Machine, places: tuple[Place, ...] = PLACES) -> tuple[Supervisor, Dispatcher]:
    dispatcher = Dispatcher(Metrics())
    crew = Supervisor(
        Cluster(places),
        DIGESTS,
        machine,
        dispatcher,
        folder=Path("fam"),
        tokenizer="",
        log=Log(None),
        sweep=machine.sweep,
        at_last=machine.sweep,
        dice=random.Random(0),
    )
    return crew, dispatcher


def watched(
    work: Callable[[Supervisor, Dispatcher, Machine], Awaitable[None]],
    machine: Machine | None = None,
    places: tuple[Place, ...] = PLACES,
) -> None:
    async def whole() -> None:
        there = machine or Machine()
        crew, dispatcher = supervised(there, places)
        await crew.start()
        try:
            await work(crew, dispatcher, there)
        finally:
            await crew.stop()
        assert all(process.over.is_set() for _, process in there.started), "no process stays"
        assert not dispatcher.workers and there.swept

    run_virtual(whole())


def states(crew: Supervisor) -> dict[str, str]:
    return {one.name: one.state for one in crew.standing({})}


def test_all_are_ready_when_the_start_returns() -> None:
    async def work(crew: Supervisor, dispatcher: Dispatcher, machine: Machine) -> None:
        assert set(dispatcher.workers) == {"p", "d"} and states(crew) == {"p": "up", "d": "up"}
        assert not crew.failure and not crew.missing()

    watched(work)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"d": {"fit": "other"}}, "'d'.*do not fit those of the others"),
        ({"d": {"worker": "e"}}, "'d'.*calls itself 'e'"),
        ({"p": {"modules": {"base#bbbbbbbbbbbb": "b"}}}, "'p'.*does not host 'own'.*it hosts base"),
        ({"p": {"modules": {"base#bbbbbbbbbbbb": "b", "own#ffffffffffff": "f"}}}, "'p'.*does not host 'own'"),
        ({"p": {"roles": ("decode",)}}, "'p'.*roles decode, not prefill"),
    ],
)
def test_a_worker_that_is_not_what_the_cluster_says_is_refused_by_name(
    changes: dict[str, dict[str, Any]], told: str
) -> None:
    async def work() -> None:
        machine = Machine(changes)
        crew, dispatcher = supervised(machine)
        with pytest.raises(Refused, match=told):
            await crew.start()
        assert all(process.over.is_set() for _, process in machine.started) and not dispatcher.workers

    run_virtual(work())


def test_one_that_cannot_be_started_ends_the_start() -> None:
    async def work() -> None:
        crew, _ = supervised(Machine(refuses=True))
        with pytest.raises(
            Refused, match="'p' cannot be started: it ended before it was ready .ended with status 2"
        ):
            await crew.start()

    run_virtual(work())


def test_who_dies_is_started_again_and_its_capacity_comes_back() -> None:
    async def work(crew: Supervisor, dispatcher: Dispatcher, machine: Machine) -> None:
        await asyncio.sleep(2 * QUICK)
        machine.latest("d").dies("ended by signal 9")
        await asyncio.sleep(0.01)
        assert "d" not in dispatcher.workers and crew.missing() == {"d": "starting"} and not crew.failure
        await asyncio.sleep(3)
        assert "d" in dispatcher.workers and not crew.missing()
        assert {one.name: one.restarts for one in crew.standing({})} == {"p": 0, "d": 1}

    watched(work)


def test_pauses_grow_and_who_dies_quickly_too_often_is_given_up() -> None:
    async def work(crew: Supervisor, dispatcher: Dispatcher, machine: Machine) -> None:
        times = []
        for _ in range(MOST_QUICK):
            assert states(crew)["d"] == "up"
            died = asyncio.get_running_loop().time()
            machine.latest("d").dies("ended by signal 11")
            await asyncio.sleep(0.01)
            while states(crew)["d"] == "starting":
                await asyncio.sleep(0.1)
            times.append(asyncio.get_running_loop().time() - died)
        assert times[:-1] == sorted(times[:-1]) and times[-2] > 2 * times[0]
        assert states(crew)["d"] == "given up" and "signal 11" in crew.failure
        assert "start the server again" in crew.failure
        await asyncio.sleep(10 * LONGEST_PAUSE)
        assert states(crew) == {"p": "up", "d": "given up"}

    watched(work)


def test_who_runs_elsewhere_is_waited_for_however_often_it_is_lost() -> None:
    places = (PLACES[0], replace(PLACES[1], spawn=None, url="http://10.0.0.1:8001"))

    async def work(crew: Supervisor, dispatcher: Dispatcher, machine: Machine) -> None:
        for _ in range(3 * MOST_QUICK):
            machine.latest("d").dies("no word from the server")
            await asyncio.sleep(0.01)
            assert states(crew)["d"] == "starting" and not crew.failure
            await asyncio.sleep(2 * LONGEST_PAUSE)
            assert states(crew)["d"] == "up"

    watched(work, places=places)


def test_who_is_away_at_the_start_is_not_waited_for_where_another_does_the_same() -> None:
    places = tuple(
        replace(place, spawn=None, url=f"http://10.0.0.1:800{n}")
        for n, place in enumerate((*PLACES, replace(PLACES[1], name="e")))
    )
    machine = Machine(away={"e"})

    async def work(crew: Supervisor, dispatcher: Dispatcher, machine: Machine) -> None:
        assert states(crew) == {"p": "up", "d": "up", "e": "starting"} and not crew.failure
        await asyncio.sleep(10 * READY_SECONDS)
        machine.away.clear()
        await asyncio.sleep(2)
        assert states(crew)["e"] == "up"

    watched(work, machine, places)


def test_who_is_away_at_the_start_is_waited_for_where_nobody_does_the_same() -> None:
    places = (PLACES[0], replace(PLACES[1], spawn=None, url="http://10.0.0.1:8001"))

    async def work() -> None:
        machine = Machine(away={"d"})
        crew, _ = supervised(machine, places)
        starting = asyncio.create_task(crew.start())
        await asyncio.sleep(10 * READY_SECONDS)
        assert not starting.done()
        machine.away.clear()
        await starting
        assert states(crew)["d"] == "up"
        await crew.stop()

    run_virtual(work())


def test_who_loads_long_and_dies_at_once_died_quickly() -> None:
    async def work(crew: Supervisor, dispatcher: Dispatcher, machine: Machine) -> None:
        for _ in range(MOST_QUICK):
            while states(crew)["d"] != "up":
                await asyncio.sleep(1)
            machine.latest("d").dies("ended by signal 11")
            await asyncio.sleep(0.01)
        assert states(crew)["d"] == "given up"

    watched(work, Machine(loads=2 * QUICK))


def test_a_machine_without_room_for_a_process_is_asked_again() -> None:
    async def work(crew: Supervisor, dispatcher: Dispatcher, machine: Machine) -> None:
        machine.short = 2
        machine.latest("d").dies("ended by signal 9")
        await asyncio.sleep(10)
        assert states(crew)["d"] == "up" and not machine.short

    watched(work)


def test_one_that_comes_back_as_another_is_not_let_in() -> None:
    async def work(crew: Supervisor, dispatcher: Dispatcher, machine: Machine) -> None:
        machine.changes["d"] = {"fit": "other"}
        machine.latest("d").dies("ended by signal 9")
        await asyncio.sleep(5)
        assert "d" not in dispatcher.workers
        assert not machine.latest("d").held, "its line is closed as well"
        machine.changes.clear()
        await asyncio.sleep(5)
        assert "d" in dispatcher.workers

    watched(work)


def test_an_engine_that_broke_goes_with_its_process() -> None:
    async def work(crew: Supervisor, dispatcher: Dispatcher, machine: Machine) -> None:
        before = machine.latest("p")
        dispatcher.broke("p", "the engine failed")
        await asyncio.sleep(3)
        assert before.over.is_set() and machine.latest("p") is not before and "p" in dispatcher.workers

    watched(work)


def test_who_does_not_end_is_killed_within_the_time_for_it() -> None:
    async def work() -> None:
        machine = Machine()
        crew, _ = supervised(machine)
        await crew.start()
        machine.latest("p").stubborn = True
        began = asyncio.get_running_loop().time()
        await crew.stop()
        assert asyncio.get_running_loop().time() - began <= LAST_WORDS + 0.1
        assert machine.latest("p").how == "killed" and machine.latest("d").how == "dismissed"

    run_virtual(work())


def test_a_start_that_is_broken_off_leaves_nothing() -> None:
    async def work() -> None:
        machine = Machine()
        crew, dispatcher = supervised(machine)
        starting = asyncio.ensure_future(crew.start())
        await asyncio.sleep(0.5)
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await crew.stop()
        await asyncio.sleep(60)
        assert not machine.started and not dispatcher.workers

    run_virtual(work())
