"""``heliostat bench train``: training steps on this machine, side by side, with a page of tables and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli.printing import Json, print_json
from heliostat.errors import Refused


def train(
    tuners: Annotated[
        str, typer.Option(help="By comma: full, lora, paca, frozen, peft-lora, peft-dora, peft-paca.")
    ] = "full,lora,paca",
    dropbp: Annotated[str, typer.Option(help="Drop rates, by comma; 0 among them.")] = "0,0.5,0.75,0.875",
    r: Annotated[int, typer.Option(min=1, help="Rank of adapters; columns also at twice of it.")] = 16,
    peft: Annotated[bool, typer.Option("--peft/--no-peft", help="PEFT's LoRA and DoRA beside ours.")] = True,
    repeats: Annotated[int, typer.Option(help="Steps of each case, taken in turn; at least 5.")] = 7,
    hidden_size: Annotated[int, typer.Option(min=64, help="Width of the model.")] = 512,
    layers: Annotated[int, typer.Option(min=1, help="Its depth.")] = 8,
    vocabulary: Annotated[int, typer.Option(min=2, help="Its tokens.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 256,
    spoken: Annotated[int, typer.Option(min=1, help="Of them with a loss.")] = 64,
    loss_steps: Annotated[int, typer.Option(min=0, help="Steps of the runs that compare losses.")] = 60,
    budget_mib: Annotated[int, typer.Option(min=1, help="Memory for the longest sequence, MiB.")] = 1024,
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:N; auto: cuda where torch sees one.")
    ] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for tuning.md, tuning.json and pictures.")] = Path(
        "out/bench"
    ),
    as_json: Json = False,
) -> None:
    """Tuners and drop rates: time, memory, loss.

    Full tuning, LoRA and PaCA, branches dropped or not, in training steps side by side.
    """
    from rich.console import Console

    from heliostat.bench.tuning import Wish
    from heliostat.bench.tuning_page import main, verdicts

    wish = Wish(
        tuners=tuple(part.strip() for part in tuners.split(",")),
        rates=_rates(dropbp),
        r=r,
        peft=peft,
        repeats=repeats,
        hidden_size=hidden_size,
        layers=layers,
        vocabulary=vocabulary,
        batch=batch,
        length=length,
        spoken=spoken,
        loss_steps=loss_steps,
        budget_mib=budget_mib,
        device=device,
    )
    found, page = main(wish, out, console=Console(stderr=True))
    if as_json:
        return print_json({**found, "page": str(page)})
    print("\n".join(verdicts(found)))
    print(page)


def _rates(text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError as error:
        raise Refused(f"--dropbp {text}: numbers with commas between them, as 0,0.5") from error
