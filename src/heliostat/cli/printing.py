"""How commands print: notes on stderr, results on stdout, as tables for people or as one JSON object."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

Family = Annotated[Path, typer.Argument(metavar="FAM", help="Folder of the family.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]

SHOWN = 300
"""Characters of a text that a sample shows."""

UNFOLDED = 1000
"""Characters of a line that goes into a file or a pipe: names stay whole for whoever searches them."""


def note(line: str) -> None:
    """Something to know along the way; never part of the result."""
    typer.echo(line, err=True)


def print_json(value: Mapping[str, Any]) -> None:
    """The one JSON object of a ``--json`` run."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(
    rows: Iterable[Sequence[str]], *, title: str, columns: Sequence[str] = (), whole: Sequence[str] = ()
) -> None:
    """A table; without names of columns the first column is what the others are about.

    ``whole``: columns that stay on one line where the terminal is narrow, as long as others can give way.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        show_header=bool(columns),
    )
    filled = [[Text(cell) for cell in row] for row in rows]
    for place in range(len(columns) or max((len(row) for row in filled), default=0)):
        style, name = "cyan" if place == 0 else None, columns[place] if columns else ""
        table.add_column(name, style=style, overflow="fold", no_wrap=name in whole)
    for row in filled:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNFOLDED
    console.print(Text(title, style="bold"), soft_wrap=True)  # a table would break it at its own width
    console.print(table)


def print_samples(samples: Iterable[Mapping[str, str]], *, title: str) -> None:
    """Prompts with what was said to them, one under the other."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    console.print(Text(title, style="bold"))
    for sample in samples:
        width = max(map(len, sample))
        for name, text in sample.items():
            console.print(Text(f"  {name:>{width}}  ", style="cyan") + Text(shortened(text)), soft_wrap=True)
        console.print()


def print_next(commands: Iterable[Sequence[object]]) -> None:
    """What to type next."""
    print("next:")
    for words in commands:
        print("  " + shlex.join(["heliostat", *map(str, words)]))


def shortened(text: str) -> str:
    """A text on one line, its middle left out where it is long."""
    line = text.replace("\n", "⏎")
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 60]} ... {line[-55:]}"


def percent(share: float) -> str:
    """A share in [0, 1] for people."""
    return f"{100 * share:.1f} %"
