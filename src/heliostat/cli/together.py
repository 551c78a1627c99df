"""A command in several processes on this machine: started together, ended together, the first one heard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from heliostat.errors import Refused

MOST = 64
"""Processes that are started at most."""
PATIENCE = 15.0
"""Seconds in which the others may end by themselves when one has failed."""
_RUN = "from heliostat.cli import main; main()"


def started() -> int:
    """How many processes this one was started with, by us or by torchrun; 1: it is alone."""
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1


def start(count: int, words: Sequence[str] | None = None) -> int:
    """Run ``heliostat`` with these words (those of this command) in so many processes; returns the exit status.

    They meet through a file, so no port is opened before they know each other, and then on the loopback only.
    """
    if not 1 <= count <= MOST:
        raise Refused(f"--processes {count}: 1 to {MOST}")
    words = sys.argv[1:] if words is None else words
    with tempfile.TemporaryDirectory(prefix="heliostat-") as folder:
        logs = [(Path(folder) / f"{number}.log").open("w+b") for number in range(count)]
        processes = [_start(number, count, words, folder, logs[number]) for number in range(count)]
        before = {
            # A terminal's Ctrl-C reaches all of them; this one only waits. A handler of ours is not inherited.
            signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
            signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: _end(processes)),
        }
        try:
            _wait(processes)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for process in processes:
                process.kill()
                process.wait()
        if not processes[0].returncode:
            for process, log in zip(processes[1:], logs[1:], strict=True):
                if process.returncode:
                    log.seek(0)
                    sys.stderr.write(log.read().decode(errors="replace"))
        for log in logs:
            log.close()
        return next((abs(p.returncode) for p in processes if p.returncode), 0)


def _start(
    number: int, count: int, words: Sequence[str], folder: str, log: IO[bytes]
) -> subprocess.Popen[bytes]:
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {
        "OMP_NUM_THREADS": threads,
        "GLOO_SOCKET_IFNAME": "lo",
        **os.environ,
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(count),
        "HELIOSTAT_MEETING": str(Path(folder) / "meeting"),
    }
    return subprocess.Popen(
        [sys.executable, "-c", _RUN, *words],
        env=environment,
        stdout=None if number == 0 else subprocess.DEVNULL,
        stderr=None if number == 0 else log,
    )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.terminate()


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended; where one fails, the others have a moment to end too."""
    end: float | None = None
    while any(p.poll() is None for p in processes):
        if end is None and any(p.returncode for p in processes if p.poll() is not None):
            end = time.monotonic() + PATIENCE
        if end is not None and time.monotonic() > end:
            return
        time.sleep(0.05)
