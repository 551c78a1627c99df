"""What is left of a worker's process when it has ended, or when nobody waits for it any more: nothing."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from heliostat.serve import processes
from heliostat.serve.cluster import Cluster, Place
from heliostat.serve.link import Ends
from heliostat.serve.link_client import RemoteWorker
from heliostat.serve.log import Log
from heliostat.serve.processes import Means, Process, Starter
from heliostat.serve.protocol import WorkerSettings

PLACE = Place(name="d", roles=("decode",), modules=("base",))


def idle(settings: WorkerSettings | None = None) -> subprocess.Popen[bytes]:
    """A process that lives while its input is open."""
    return subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)


def test_the_line_to_a_process_that_died_is_closed() -> None:
    async def work() -> None:
        line, other = Ends.pair()
        worker = RemoteWorker(line)
        worker.start()
        process = Process(idle(), worker)
        process.kill()
        assert await process.ended() == "ended by signal 9"
        await asyncio.sleep(0)
        assert line.other is None and other.other is None
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing asks for it any more"

    asyncio.run(work())


def gone(processes: list[subprocess.Popen[bytes]]) -> bool:
    """Whether they have ended and been waited for; asks nobody."""
    return all(process.returncode is not None for process in processes)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Processes that are started instead of workers."""
    found: list[subprocess.Popen[bytes]] = []

    def spawn(settings: WorkerSettings) -> subprocess.Popen[bytes]:
        found.append(idle())
        return found[-1]

    monkeypatch.setattr(processes, "spawn", spawn)
    return found


def test_a_start_that_is_broken_off_leaves_when_its_process_is_gone(
    started: list[subprocess.Popen[bytes]],
) -> None:
    async def work() -> None:
        starter = Starter(Means(Path("fam")), Cluster((PLACE,)), {"d": 1}, Log(None))
        starting = asyncio.ensure_future(starter(PLACE, {}))
        while not started:
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert gone(started)
        starter.leave()

    asyncio.run(work())


def test_a_process_that_cannot_be_reached_goes_and_the_reason_is_an_ordinary_one(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_sockets(path: Path, *, bind: bool) -> None:
        raise processes.zmq.ZMQError(24)

    async def work() -> None:
        starter = Starter(Means(Path("fam")), Cluster((PLACE,)), {"d": 1}, Log(None))
        monkeypatch.setattr(processes, "Wire", out_of_sockets)
        monkeypatch.setattr(Path, "exists", lambda path: True)
        with pytest.raises(OSError, match="open files"):
            await starter(PLACE, {})
        assert gone(started)
        starter.leave()

    asyncio.run(work())
