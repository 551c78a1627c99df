"""All commands in one table, each loaded when it is called: a new command is a new line in ``COMMANDS``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from heliostat import __version__
from heliostat.cli.failing import DEBUG, plainly, tell_error


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command is written, and what it is for."""

    module: str
    """File of heliostat.cli."""
    name: str
    """Function in it, or a Typer of further commands."""
    line: str
    panel: str


MAKE, ASK, LOOK, SHOW = "Make and change", "Ask", "Look and check", "See it work"
COMMANDS: Mapping[str, Command] = {
    "init": Command("families", "init", "Make a family around a base model.", MAKE),
    "train": Command("training", "train", "Tune a new member of a family.", MAKE),
    "quantize": Command("quantizing", "quantize", "Make a low-bit module of a family's module.", MAKE),
    "pretrain": Command("training", "pretrain", "Make a small base model from scratch.", MAKE),
    "import": Command(
        "families", "bring_in", "Take a fine-tune or an adapter into a family, unchanged.", MAKE
    ),
    "export": Command("families", "export", "Write a member as a Hugging Face folder or adapter.", MAKE),
    "member": Command("families", "member", "Remove or rename a member.", MAKE),
    "module": Command("quantizing", "module", "Add a draft, or remove a module.", MAKE),
    "judge": Command(
        "judging", "judge", "Train a judge of a draft's tokens from the speaker's own answers.", MAKE
    ),
    "generate": Command("answering", "generate", "Answer one prompt, or a file of prompts.", ASK),
    "chat": Command("chatting", "chat", "Talk with a member, and switch members as you go.", ASK),
    "serve": Command("serving", "serve", "Serve members over HTTP to any OpenAI client.", ASK),
    "cluster": Command(
        "clustering", "cluster", "Size and write down vLLM servers for several machines.", ASK
    ),
    "eval": Command("grading", "grade_member", "Grade a member's answers to held-out data.", ASK),
    "inspect": Command("inspecting", "inspect_family", "Show modules, members, and what they share.", LOOK),
    "check": Command(
        "inspecting", "check", "Check that files are whole and that serving does as training did.", LOOK
    ),
    "bench": Command(
        "benching", "bench", "Measure training, ways of sharing or a server, side by side.", LOOK
    ),
    "plan": Command("planning", "plan", "Say from logs whether sharing would be worth it.", LOOK),
    "demo": Command("showing", "demo", "Tune one task in every way of sharing, and compare.", SHOW),
}


class Commands(Mapping[str, Any]):
    """The commands by name, each read from its file when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        command = COMMANDS[name]
        target = getattr(importlib.import_module(f"heliostat.cli.{command.module}"), command.name)
        if not isinstance(target, typer.Typer):
            alone = typer.Typer(add_completion=False, rich_markup_mode=None)
            details = inspect.getdoc(target)
            text = f"{command.line}\n\n{details}" if details else command.line
            alone.command(name, help=text)(target)
            target = alone
        built = typer.main.get_command(target)
        built.name = name
        return built

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Deferred(TyperCommand):
    """What the list of commands shows of one; it becomes the real one when it is called."""

    def __init__(self, name: str) -> None:
        command = COMMANDS[name]
        super().__init__(name, help=command.line, rich_help_panel=command.panel)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the real command."""
        return Commands()[str(self.name)].make_context(info_name, args, parent=parent, **extra)


class Root(TyperGroup):
    """``heliostat`` itself: finds the command, and says in one line what went wrong."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = Commands()  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, not yet loaded."""
        return Deferred(cmd_name) if cmd_name in COMMANDS else None

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a refusal or Ctrl-C becomes one message and an exit status."""
        with plainly():
            return super().invoke(ctx)


app = typer.Typer(
    cls=Root,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Options are taken in the spelling of the recipes, too: --learning_rate.
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda s: s.replace("_", "-"),
    },
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"heliostat {__version__}")
        raise typer.Exit


@app.callback()
def _heliostat(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fine-tune many specialists from one base so that they share half of themselves, and run them as one."""


def main() -> None:
    """Run the command line; never returns."""
    # A library's warning with its path and line helps nobody here; what is ours is said as a note.
    warnings.showwarning = _show_warning
    try:
        app(prog_name="heliostat")
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        tell_error(f"{type(error).__name__}: {error} (a fault of heliostat; {DEBUG}=1 shows where)")
        sys.exit(1)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
    if "heliostat" in filename or os.environ.get(DEBUG):
        typer.secho(f"note: {message}", fg="yellow", err=True)
