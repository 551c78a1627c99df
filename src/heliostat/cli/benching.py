"""``heliostat bench``: what can be measured, each with a page of tables and pictures."""

from __future__ import annotations

import typer

from heliostat.cli.comparing import decode, workflow
from heliostat.cli.kernels import kernels
from heliostat.cli.measuring import client, replay
from heliostat.cli.sizing import workers
from heliostat.cli.speculating import speculate
from heliostat.cli.stepping import train

bench = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure training, ways of sharing or a server, side by side.",
)
bench.command("train")(train)
bench.command("client")(client)
bench.command("replay")(replay)
bench.command("workers")(workers)
bench.command("workflow")(workflow)
bench.command("decode")(decode)
bench.command("kernels")(kernels)
bench.command("speculate")(speculate)
