"""``heliostat bench kernels``: products with weights in codebooks beside dense ones and other people's."""

from __future__ import annotations

from os import getloadavg
from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli.printing import Json, print_json


def kernels(
    quick: Annotated[bool, typer.Option(help="One shape and three batches.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for codegemm.md, .json and .svg.")] = Path("out/bench"),
    as_json: Json = False,
) -> None:
    """Low-bit products: every shape, batch and format.

    Beside dense bf16 and fp32, int8, llama.cpp's and AQLM's kernels where they are, and the time that memory takes.
    """
    from rich.console import Console

    from heliostat.bench.birth import certificate
    from heliostat.bench.kernels import Plan, measure
    from heliostat.bench.kernels_page import page, write

    plan = Plan(shapes=((4096, 4096),), batches=(1, 4, 16)) if quick else Plan()
    note = Console(stderr=True)
    found = measure(plan, tell=lambda text: note.print(text, highlight=False))
    birth = certificate(
        "heliostat bench kernels" + (" --quick" if quick else ""), repeats=plan.repeats, load=getloadavg()[1]
    )
    write(found, birth, out)
    if as_json:
        print_json({"birth": birth, "found": found})
        return
    Console().print(page(found, birth), highlight=False, markup=False)
