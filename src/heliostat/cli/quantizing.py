"""``heliostat quantize``, ``module add`` and ``module rm``: modules that are nobody's own, low-bit ones and drafts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.cli.advance import Advance
from heliostat.cli.failing import stop
from heliostat.cli.printing import Family, Json, note, print_json, print_next, print_table
from heliostat.files import readable_size

if TYPE_CHECKING:
    from heliostat.quantize.run import Quantized


def quantize(
    family: Family,
    name: Annotated[str, typer.Option(help="Name of the new module.", show_default=False)],
    data: Annotated[
        Path,
        typer.Option(
            help="Texts to fit on: jsonl of any kind that train reads, or .txt.", show_default=False
        ),
    ],
    format: Annotated[
        str,
        typer.Option(
            help="mXvYgZ: X codes for Y numbers, a scale for every Z (or row). m1v4g128: 2 bits, m2v4g128: 4."
        ),
    ] = "m1v4g128",
    module: Annotated[str, typer.Option(help="What is quantized: a whole module of the family.")] = "base",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the data that are used, at most.")] = 32_768,
    tuning_steps: Annotated[
        int, typer.Option(min=0, help="Steps in which each block is tuned as a whole; 0: none.")
    ] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn by chance.")] = 0,
    as_json: Json = False,
) -> None:
    """All Linears of the blocks; embedding, head and norms stay. Interrupted or killed, the same command goes on."""
    from heliostat.quantize.run import Wish, quantize

    wish = Wish(
        family=str(family),
        name=name,
        format=format,
        data=str(data),
        module=module,
        tokens=tokens,
        tuning_steps=tuning_steps,
        seed=seed,
    )
    with Advance(f"{name}: {format}", as_json=as_json) as bar:
        try:
            made = quantize(wish, tell=bar.tell, echo=note)
        except KeyboardInterrupt:
            stop(f"stopped behind layer {bar.done}; the same command goes on from there")
    if as_json:
        return print_json(made.to_json())
    _show(family, name, made)


def _show(family: Path, name: str, made: Quantized) -> None:
    linears = list(dict.fromkeys(key for layer in made.errors for key in layer))
    short = [key.rpartition(".")[2] for key in linears]
    rows = [(str(n), *(f"{layer[key]:.4f}" for key in linears)) for n, layer in enumerate(made.errors)]
    print_table(rows, title="Relative squared error, by layer", columns=("layer", *short))
    (before, after), (was, now) = made.perplexity, made.linear_bytes
    facts = [
        ("made of", made.source),
        ("format", f"{made.format}, {made.bits:.2f} bits a weight with codebooks and scales"),
        ("Linears of the blocks", f"{readable_size(was)} in 16 bits -> {readable_size(now)}"),
        ("embedding, head, norms", "as they were"),
        ("perplexity, held out", f"{before:.3f} -> {after:.3f} ({made.held_out_tokens:,} tokens)"),
        ("calibration", f"{made.tokens:,} tokens"),
        ("seconds", f"{made.seconds:,.1f}"),
    ]
    print_table(facts, title=f"{name} is a module of {family}")
    train = ["train", family, "--member", "NEW", "--data", "DATA.jsonl", "--sharing"]
    print_next(
        [[*train, "sun", "--speaker", name], [*train, "prefillshare", "--writer", name], ["inspect", family]]
    )


module = typer.Typer(add_completion=False, no_args_is_help=True, help="Add a draft, or remove a module.")


@module.command("add")
def _add(
    family: Family,
    name: Annotated[str, typer.Argument(metavar="MODULE", show_default=False)],
    source: Annotated[
        Path, typer.Option("--from", help="Checkpoint with the family's tokenizer.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Take a small model into the family that drafts for its speakers; it may have any shape, and is no member."""
    from heliostat.export import import_draft

    made = import_draft(family, name, source)
    if as_json:
        return print_json({"module": name, "digest": made.digest, "parameters": made.parameters})
    print(f"{name} is a module of {family} now, {made.parameters:,} parameters")
    judge = ["judge", family, "--speaker", "base", "--draft", name, "--data", "PROMPTS.jsonl"]
    print_next([["serve", family, "--draft", name], judge])


@module.command("rm")
def _remove(
    family: Family, name: Annotated[str, typer.Argument(metavar="MODULE", show_default=False)]
) -> None:
    """Remove a module that no member uses: a quantized one, or a draft."""
    from heliostat.quantize.run import remove_module

    remove_module(family, name)
    print(f"{name} is no module any more")
