"""``heliostat demo``: one embedded task in every way of sharing, with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli.failing import stop
from heliostat.cli.printing import Json, print_json


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the family and the report.")] = Path("out/demo"),
    task: Annotated[str, typer.Option(help="Embedded task: tools, math or edit.")] = "tools",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of each member.", show_default="by the task")
    ] = None,
    as_json: Json = False,
) -> None:
    """Interrupt it and run it again: it goes on. The report is OUT/report.html and opens without a server."""
    from heliostat.family import choose
    from heliostat.tasks import TASKS

    choose(task, TASKS, what="task")
    from heliostat.bench.demo import main
    from heliostat.train.loop import Interrupted

    try:
        if steps is None:
            results = main(out=out, task=task, as_json=as_json)
        else:
            results = main(out=out, task=task, steps=steps, as_json=as_json)
    except Interrupted as error:
        stop(f"{error}; the same command goes on from there")
    if as_json:
        print_json(results)
