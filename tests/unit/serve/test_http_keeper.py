"""A process that keeps another one: both end together, whoever goes first."""

import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from heliostat.files import OWNER, hold
from heliostat.serve.http_keeper import Kept, spawn

CHILD = "import os, sys, time; print(os.getpid(), os.environ['MARK'], flush=True); time.sleep(600)"


def kept(folder: Path, program: str = CHILD) -> Kept:
    return Kept((sys.executable, "-c", program), {"MARK": "marked"}, str(folder / "log"))


def child_of(folder: Path) -> int:
    """The number that the child wrote, as soon as it did."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        text = (folder / "log").read_text() if (folder / "log").exists() else ""
        if "marked" in text:
            return int(text.split()[0])
        time.sleep(0.01)
    raise AssertionError("the child did not start")


def gone(process: int) -> bool:
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_the_child_ends_when_nobody_holds_the_keepers_input(tmp_path: Path) -> None:
    with spawn(kept(tmp_path)) as keeper:
        child = child_of(tmp_path)
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait(20)
    assert gone(child)


def test_it_ends_at_once_when_told(tmp_path: Path) -> None:
    with spawn(kept(tmp_path)) as keeper:
        child = child_of(tmp_path)
        keeper.terminate()
        assert keeper.wait(20)
    assert gone(child)


def test_the_child_goes_with_a_keeper_that_is_killed(tmp_path: Path) -> None:
    if sys.platform != "linux":
        return
    with spawn(kept(tmp_path)) as keeper:
        child = child_of(tmp_path)
        os.kill(keeper.pid, signal.SIGKILL)
        keeper.wait(20)
    assert gone(child)


def test_a_parents_memory_goes_with_its_last_server_where_the_parent_is_gone(tmp_path: Path) -> None:
    """The child holds a lock there, as a server does, and does not end when asked to."""
    memory = tmp_path / "memory"
    memory.mkdir()
    owner = hold(memory / OWNER)
    stubborn = f"import signal, pathlib; from heliostat.files import hold; hold(pathlib.Path({str(memory / 'x.lock')!r})); "
    stubborn += "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    for parent_lives in (True, False):
        asked = msgspec.structs.replace(kept(tmp_path, stubborn + CHILD), memory=str(memory))
        with spawn(asked) as keeper:
            child_of(tmp_path)
            if not parent_lives:
                os.close(owner)
            assert keeper.stdin is not None
            keeper.stdin.close()
            keeper.wait(20)
        (tmp_path / "log").unlink()
        assert memory.exists() == parent_lives


STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), os.environ['MARK'], flush=True)
time.sleep(600)
"""


def test_a_child_that_does_not_listen_goes_with_a_keeper_that_is_killed(tmp_path: Path) -> None:
    if sys.platform != "linux":
        return
    with spawn(kept(tmp_path, STUBBORN)) as keeper:
        child = child_of(tmp_path)
        os.kill(keeper.pid, signal.SIGKILL)
        keeper.wait(20)
    assert gone(child)


def test_the_childs_status_is_told(tmp_path: Path) -> None:
    with spawn(kept(tmp_path, "raise SystemExit(7)")) as keeper:
        assert keeper.wait(20) == 7
