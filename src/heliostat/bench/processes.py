"""Trials in processes of their own, a few at a time, each with a log; one that fails is named and stops the rest.

They end with the process that started them, whether by Ctrl-C or by SIGTERM.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console


def run_modules(waiting: Mapping[str, Sequence[str]], *, logs: Path, workers: int, console: Console) -> None:
    """``python -m`` these words by name, ``workers`` at a time; what they say goes to ``logs``/NAME.log."""
    left = dict(waiting)
    running: dict[str, subprocess.Popen[bytes]] = {}
    begin = time.perf_counter()
    with _leaving_on_sigterm():
        try:
            while left or running:
                while left and len(running) < workers:
                    name = next(iter(left))
                    running[name] = _start(left.pop(name), logs / f"{name}.log")
                time.sleep(0.2)
                for name in [n for n, process in running.items() if process.poll() is not None]:
                    if running.pop(name).returncode:
                        raise RuntimeError(f"trial {name} failed; its log: {logs / name}.log")
                    done = len(waiting) - len(left) - len(running)
                    console.print(
                        f"{done}/{len(waiting)} {name}  {(time.perf_counter() - begin) / 60:.1f} min"
                    )
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, instead of leaving trials behind that hold the folder's lock."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        return subprocess.Popen([sys.executable, "-m", *words], stdout=out, stderr=subprocess.STDOUT)
