"""The command line answers `--help` without loading torch or transformers: people wait for it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = ("torch", "transformers", "peft")

HELP = """
import sys
from heliostat.cli import main
sys.argv = ["heliostat", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
REPORT = f"""
print("loaded:", *[name for name in {SLOW!r} if name in sys.modules])
"""


def loaded(program: str, *arguments: str, path: Path | None = None) -> list[str]:
    """Which of the slow libraries another Python has loaded once it ran ``program``."""
    search = os.pathsep.join(map(str, filter(None, [path, os.environ.get("PYTHONPATH")])))
    run = subprocess.run(
        [sys.executable, "-c", program + REPORT, *arguments],
        env={**os.environ, "PYTHONPATH": search, "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1].split()[1:]


def written() -> bool:
    """Whether the command line is there."""
    return (found := importlib.util.find_spec("heliostat.cli")) is not None and found.origin is not None


@pytest.mark.skipif(not written(), reason="heliostat.cli is not written yet")
@pytest.mark.parametrize("command", ["", "init", "train", "inspect", "generate", "eval", "export", "demo"])
def test_help_loads_nothing_slow(command: str) -> None:
    assert loaded(HELP, *command.split(), "--help") == []


def test_importing_the_package_loads_nothing_slow() -> None:
    assert loaded("import sys, heliostat") == []


@pytest.mark.parametrize("library", SLOW)
def test_a_slow_library_that_is_loaded_is_seen(tmp_path: Path, library: str) -> None:
    (tmp_path / f"{library}.py").touch()  # a namesake, so that this test is not slow itself
    assert loaded(f"import sys, {library}", path=tmp_path) == [library]
