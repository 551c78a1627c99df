"""The table of commands: all load, wrong words are answered with the right ones, failures are one message."""

import pytest
import typer

from heliostat import __version__
from heliostat.cli import app
from heliostat.cli.root import COMMANDS
from tests.unit.cli.conftest import Heliostat


def test_help_lists_every_command_with_its_line(heliostat: Heliostat) -> None:
    shown = heliostat("--help").stdout
    for name, command in COMMANDS.items():
        assert name in shown and command.line in shown and command.panel in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(heliostat: Heliostat, name: str) -> None:
    shown = " ".join(heliostat(name, "--help").stdout.split())
    assert f"Usage: heliostat {name}" in shown
    assert COMMANDS[name].line in shown or name in ("member", "cluster")  # groups say more


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_help(name: str) -> None:
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    bare = [p.name for p in command.params if p.param_type_name == "option" and not (p.help or p.hidden)]
    assert bare == []


def test_version(heliostat: Heliostat) -> None:
    assert heliostat("--version").stdout == f"heliostat {__version__}\n"


def test_misspelled_commands_and_options_suggest(heliostat: Heliostat) -> None:
    assert "'train'" in heliostat("trian", status=2).stderr
    assert "--learning-rate" in heliostat("train", "fam", "--lerning-rate", "1", status=2).stderr


def test_the_debug_variable_shows_where_it_failed(
    heliostat: Heliostat, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    quiet = heliostat("inspect", "nowhere", status=2).stderr
    monkeypatch.setenv("HELIOSTAT_DEBUG", "1")
    loud = CliRunner().invoke(app, ["inspect", "nowhere"])
    assert loud.exit_code == 2
    assert "Traceback" in loud.stderr and loud.stderr.endswith(quiet)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), 2, "x.json: No such file or directory"),
        (MemoryError(), 2, "not enough memory"),
    ],
)
def test_other_failures_are_one_message(
    heliostat: Heliostat, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, said: str
) -> None:
    def fail(folder: object) -> None:
        raise error

    monkeypatch.setattr("heliostat.build.read_family", fail)
    stderr = heliostat("inspect", "fam", status=status).stderr
    assert said in stderr and len(stderr.splitlines()) == 1
