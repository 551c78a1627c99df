"""Runs the command line inside the test's own process, and shows what it printed where."""

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from heliostat.cli import app

Heliostat = Callable[..., Result]


@pytest.fixture
def heliostat(monkeypatch: pytest.MonkeyPatch) -> Heliostat:
    """Calls a command; ``status`` is the exit status it must have."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("HELIOSTAT_DEBUG", raising=False)

    def call(*words: object, status: int = 0, typed: str | None = None) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words], input=typed, prog_name="heliostat")
        assert result.exit_code == status, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
        assert "Traceback" not in result.stderr
        return result

    return call
