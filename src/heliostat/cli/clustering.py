"""``heliostat cluster``: where vLLM servers of a family fit, and the commands that start them there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from heliostat.cli.printing import note, print_table

Fam = Annotated[Path, typer.Argument(metavar="FAM", help="Folder of the family.")]
NodesFile = Annotated[Path, typer.Option(help="YAML file of machines; docs/scale-out.md says what.")]
Member = Annotated[
    list[str] | None, typer.Option(help="Who is served, once or several times; default: all and the base.")
]

cluster = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)


@cluster.callback()
def _cluster() -> None:
    """vLLM servers of a family on several machines: where they fit, and how they are started."""


@cluster.command("size")
def size(family: Fam, nodes: NodesFile, member: Member = None) -> None:
    """Which server stands where, and what memory it has; nothing is written and nothing is started."""
    from heliostat.serve.nodes import HEADS, read, told
    from heliostat.serve.rendering import sized

    found = sized(family, read(nodes), member or None)
    print_table(told(found.standings), title="vLLM servers", columns=list(HEADS))


@cluster.command("render")
def render(
    family: Fam,
    nodes: NodesFile,
    format: Annotated[str, typer.Option(help="systemd, kubernetes or ray.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the files; without it they are printed.", show_default=False),
    ] = None,
    at: Annotated[
        str | None, typer.Option(help="Where the family lies on the nodes; default: where it lies here.")
    ] = None,
    python: Annotated[
        str, typer.Option(help="Interpreter with vLLM and heliostat on the nodes.")
    ] = "python3",
    image: Annotated[str, typer.Option(help="Of containers.")] = "heliostat-vllm",
    member: Member = None,
) -> None:
    """The exact vllm commands, module by module, as texts to apply; the modules are exported beside the family."""
    from heliostat.files import atomic_write_text
    from heliostat.serve.nodes import read
    from heliostat.serve.render import Means
    from heliostat.serve.rendering import texts

    means = Means(family=at or str(family.resolve()), python=python, image=image)
    found = texts(family, read(nodes), format, means, member or None)
    for name, text in found.items():
        if out is None:
            print(f"# ---- {name}\n{text}")
        else:
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, text)
    if out is not None:
        note(f"wrote {', '.join(sorted(found))} into {out}")
