"""Trials in processes of their own: all run, one that fails stops the rest, and none outlives who started it."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from heliostat.bench.processes import run_modules

STARTER = """
import sys
from pathlib import Path
from rich.console import Console
from heliostat.bench.processes import run_modules
run_modules({"long": ["timeit", "-n", "1", "-r", "1", sys.argv[2]]}, logs=Path(sys.argv[1]), workers=1, console=Console())
"""


def words(statement: str) -> list[str]:
    return ["timeit", "-n", "1", "-r", "1", statement]


def test_all_run_and_what_they_say_is_kept(tmp_path: Path) -> None:
    said = io.StringIO()
    run_modules(
        {"a": words("print(1)"), "b": words("print(2)")}, logs=tmp_path, workers=2, console=Console(file=said)
    )
    assert (tmp_path / "a.log").read_text().startswith("1\n")
    assert (tmp_path / "b.log").read_text().startswith("2\n")
    assert "2/2" in said.getvalue()


def test_one_that_fails_is_named_and_stops_the_rest(tmp_path: Path) -> None:
    waiting = {"bad": words("raise OSError"), "never": words(f"open({str(tmp_path / 'ran')!r}, 'w')")}
    with pytest.raises(RuntimeError, match="trial bad failed"):
        run_modules(waiting, logs=tmp_path, workers=1, console=Console(file=io.StringIO()))
    assert not (tmp_path / "ran").exists()


def test_sigterm_ends_the_trials_too(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    statement = f"import os, time; open({str(begun)!r}, 'w').write(str(os.getpid())); time.sleep(120)"
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path), statement])
    while not (begun.exists() and begun.read_text()):
        assert starter.poll() is None
        time.sleep(0.05)
    starter.send_signal(signal.SIGTERM)
    assert starter.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)
