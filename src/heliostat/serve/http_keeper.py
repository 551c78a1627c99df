"""A process that keeps another one, with all that it starts: it ends them when its own parent is gone, however it died.

It gets what to start as a line of JSON on its standard input, which stays open while the parent lives. A server's own
children would outlive it if it were killed; they are in one group, and the group is ended. Who ends the parent may kill the
parent's children, too: so what keeps is a child of what was spawned, which only waits for it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from heliostat.files import OWNER, abandoned, remove_abandoned

GRACE = 2.0
"""Seconds to end by itself."""
ENDED = 128 + signal.SIGTERM
"""Exit status of who was told to end."""
_PDEATHSIG = 1
_LOOK = 0.05
"""Seconds between two looks."""


class Kept(msgspec.Struct, frozen=True):
    """What is started."""

    words: Sequence[str]
    environment: Mapping[str, str]
    """Beside the parent's."""
    log: str
    """Path of the file that all it writes is added to."""
    memory: str = ""
    """Folder of the parent, held by it (``files.hold``); it goes with the last of its servers, should the parent be gone."""


def spawn(kept: Kept) -> subprocess.Popen[bytes]:
    """Start a keeper. Keep the result: it holds the input open. SIGTERM ends all at once."""
    process = subprocess.Popen(
        [sys.executable, "-m", "heliostat.serve.http_keeper"], stdin=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(kept) + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it ended already: whoever waits for it sees that
    return process


def main(given: BinaryIO) -> int:
    """Start it and wait; returns its exit status."""
    inner = os.fork()
    if inner:
        os.close(given.fileno())
        signal.signal(signal.SIGTERM, lambda *_: os.kill(inner, signal.SIGTERM))
        return os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED))
    _die_with_parent()
    os.setsid()
    return _keep(given)


def _keep(given: BinaryIO) -> int:
    kept = msgspec.json.decode(given.readline(), type=Kept)
    with Path(kept.log).open("ab") as log:
        child = subprocess.Popen(
            kept.words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **kept.environment},
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    signal.signal(signal.SIGTERM, lambda *_: _end(child, 0.0))
    threading.Thread(target=_until_orphaned, args=(given, child), daemon=True).start()
    status = child.wait()
    _kill_group(child.pid)  # what it left behind
    if kept.memory:
        _leave(Path(kept.memory))
    return status if status >= 0 else 128 - status


def _die_with_parent() -> None:
    """Should the parent itself be killed, the kernel ends its child; only Linux does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGTERM)


def _until_orphaned(given: BinaryIO, child: subprocess.Popen[bytes]) -> None:
    while os.read(given.fileno(), 1):
        pass
    _end(child, GRACE)


def _end(child: subprocess.Popen[bytes], grace: float) -> None:
    if grace:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(grace)
    _kill_group(child.pid)


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(group, signal.SIGKILL)


def _leave(folder: Path) -> None:
    """Remove what a parent that is gone had in memory, as soon as those that were killed let go of it."""
    until = time.monotonic() + GRACE
    while abandoned(folder / OWNER) and time.monotonic() < until:
        remove_abandoned([folder])
        time.sleep(_LOOK)


if __name__ == "__main__":
    sys.exit(main(sys.stdin.buffer))
