"""The command line answers `--help` without loading torch or transformers: people wait for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = ("torch", "transformers", "peft")

REPORT = f"""
def report(after):
    found = [name for name in {SLOW!r} if name in sys.modules]
    if found:
        print(after, "loads", *found)
        sys.exit()
"""
EVERY_HELP = """
import contextlib, io, sys
import typer
from heliostat.cli import app, main
report("importing heliostat.cli")
commands = typer.main.get_command(app).commands
deeper = [[name, sub] for name, command in commands.items() for sub in getattr(command, "commands", ())]
for line in [[], *([name] for name in commands), *deeper]:
    sys.argv = ["heliostat", *line, "--help"]
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            main()
    except SystemExit as end:
        if end.code or "Usage" not in shown.getvalue():
            print(*line, "shows no help:", end.code)
    report(" ".join(sys.argv))
"""


def said(program: str, *, path: Path | None = None) -> str:
    """What another Python says of the slow libraries that ``program`` makes it load; empty if none."""
    search = os.pathsep.join(filter(None, [str(path or ""), os.environ.get("PYTHONPATH", "")]))
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\n{REPORT}\n{program}"],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_no_help_loads_anything_slow() -> None:
    assert said(EVERY_HELP) == ""


def test_importing_the_package_loads_nothing_slow() -> None:
    assert said("import heliostat\nreport('importing heliostat')") == ""


@pytest.mark.parametrize("library", SLOW)
def test_a_slow_library_that_is_loaded_is_seen(tmp_path: Path, library: str) -> None:
    (tmp_path / f"{library}.py").touch()  # a namesake, so that this test is not slow itself
    assert said(f"import {library}\nreport('this')", path=tmp_path) == f"this loads {library}"
