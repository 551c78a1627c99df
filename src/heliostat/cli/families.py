"""Commands that make and change families: init, import, export, member rm and rename."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli.printing import Family, Json, note, print_json, print_next, print_table

Member = Annotated[str, typer.Option(help="Name of the member.", show_default=False)]


def init(
    family: Family,
    base: Annotated[Path, typer.Option(help="Hugging Face checkpoint on this disk.", show_default=False)],
    as_json: Json = False,
) -> None:
    """The checkpoint is copied into the family: safetensors with config.json and tokenizer.json."""
    from heliostat.build import config_of, init_family

    made = init_family(family, base)
    config = config_of(family, made)
    facts = {
        "family": str(family),
        "architecture": config.architecture,
        "attention": config.attention.to_json(),
        "parameters": config.parameters,
        "max_length": config.max_length,
        "digest": made.module("base").digest,
        "tokenizer": made.tokenizer,
    }
    if as_json:
        return print_json(facts)
    rows = [
        ("architecture", config.architecture),
        ("attention", config.attention.name),
        ("parameters", f"{config.parameters:,}"),
        ("longest text", f"{config.max_length:,} tokens"),
        ("digest", made.module("base").digest[:12]),
    ]
    print_table(rows, title=f"{family}: a new family")
    print_next(
        [
            ["train", family, "--member", "NAME", "--sharing", "sun", "--data", "DATA.jsonl"],
            ["generate", family, "--prompt", "your prompt"],
        ]
    )


def bring_in(
    family: Family,
    member: Member,
    source: Annotated[
        Path, typer.Option("--from", help="Checkpoint, or PEFT adapter of the base.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """It is served as `independent`; a member that `export` wrote comes back in the row it was tuned for."""
    from heliostat.export import import_member

    entry = import_member(family, member, source)
    if as_json:
        return print_json({"member": member, "sharing": entry.sharing, "modules": list(entry.row.modules)})
    print(f"{member} is a member now, sharing {entry.sharing}: {', '.join(entry.row.modules)}")
    convert = ["--member", "NEW", "--sharing", "sun", "--teacher", member, "--data", "PROMPTS.jsonl"]
    ask: list[object] = ["generate", family, "--member", member, "--prompt", "your prompt"]
    # Only a whole model can teach; an exported half that came back is in a shared row already.
    print_next([ask, ["train", family, *convert]] if entry.row.alone else [ask])


def export(
    family: Family,
    member: Member,
    out: Annotated[Path, typer.Option(help="New folder.", show_default=False)],
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize", help="Write what a quantized other half stands for, too, as a checkpoint."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """With a model card, the base's licence, and a script that answers alike in transformers."""
    from heliostat.build import read_family
    from heliostat.export import export_member

    export_member(family, member, out, dequantize=dequantize)
    row = read_family(family).member(member).row
    if as_json:
        return print_json({"member": member, "out": str(out), "alone": row.alone})
    print(f"{member} is written to {out}: " + ", ".join(sorted(p.name for p in out.iterdir())))
    if not row.alone:
        note("half a member: the base plays the rest of its row; README.md and reproduce.py there say how")


member = typer.Typer(add_completion=False, no_args_is_help=True, help="Remove or rename a member.")


@member.command("rm")
def _remove(
    family: Family, name: Annotated[str, typer.Argument(metavar="MEMBER", show_default=False)]
) -> None:
    """Remove a member, and the modules that nobody else uses."""
    from heliostat.export import remove_member

    gone = remove_member(family, name)
    print(f"{name} is no member any more; removed: {', '.join(gone) or 'no module'}")


@member.command("rename")
def _rename(
    family: Family,
    old: Annotated[str, typer.Argument(metavar="OLD", show_default=False)],
    new: Annotated[str, typer.Argument(metavar="NEW", show_default=False)],
) -> None:
    """Give a member another name; its modules keep theirs."""
    from heliostat.export import rename_member

    rename_member(family, old, new)
    print(f"{old} is called {new} now")
