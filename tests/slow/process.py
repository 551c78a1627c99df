"""A real ``heliostat serve`` in a process of its own, for clients that come over a socket."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAIN = "from heliostat.cli import main; main()"


@contextmanager
def served(family: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """(address, process) of a server on a free port; it must end well on SIGTERM."""
    with told(family, *options) as (address, process, _):
        yield address, process


@contextmanager
def told(
    family: Path | None, *options: str, starting: float = 120
) -> Iterator[tuple[str, subprocess.Popen[str], "Reading"]]:
    """The same, and its log."""
    command = [
        sys.executable,
        "-c",
        MAIN,
        "serve",
        *([] if family is None else [str(family)]),
        "--port",
        "0",
        "--dtype",
        "float32",
        *options,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = Reading(process)
    try:
        address = log.address(starting)
        yield address, process, log
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGKILL), log.text
    finally:
        process.kill()
        process.wait()
        log.close()


class Reading:
    """Reads a server's log all the time: where nobody does, it stops at the first line that finds no room."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._lines: list[str] = []
        self._address = ""
        self._begun = threading.Event()
        self._process = process
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line)
            if not self._address and line.startswith("{") and json.loads(line)["event"] == "listening":
                self._address = json.loads(line)["address"]
                self._begun.set()
        self._begun.set()

    @property
    def text(self) -> str:
        return "".join(self._lines)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines so far that tell of this."""
        found = [json.loads(line) for line in self._lines if line.startswith("{")]
        return [line for line in found if line["event"] == name]

    def address(self, seconds: float = 120) -> str:
        """Where it listens, as soon as it does."""
        self._begun.wait(seconds)
        assert self._address, self.text
        return self._address

    def close(self) -> None:
        """The process has ended."""
        self._thread.join(10)
        assert self._process.stderr is not None
        self._process.stderr.close()
