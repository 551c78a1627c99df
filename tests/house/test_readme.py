"""What the pages tell a reader to type exists: commands with their options, make's verbs, links."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from heliostat.cli import app
from tests.house.pages import Page, anchors, broken_links, commands, pages, read, verbs, verbs_named
from tests.house.source import ROOT, modules


def real_command_line() -> Any:
    """The parser behind ``heliostat``."""
    return typer.main.get_command(app)


def misunderstood(command: Any, arguments: list[str], *, whole: bool) -> str:
    """What the command line would not understand of these arguments; empty where it understands all.

    Only the grammar is asked: no value is looked at, no file is opened. Where they are not ``whole``,
    what is required may be missing.
    """
    while arguments and getattr(command, "commands", None):
        if arguments[0].startswith("-"):
            break
        if arguments[0] not in command.commands:
            return f"no command {arguments[0]!r}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    arguments = [argument for argument in arguments if argument != "--help"]
    context = command.context_class(command, info_name=command.name, allow_interspersed_args=True)
    try:
        given, left, _ = command.make_parser(context).parse_args(list(arguments))
    except typer.TyperException as error:
        return str(error.format_message())
    if left:
        return f"unexpected {' '.join(left)}"
    missing = [p.opts[0] for p in command.params if p.required and given.get(p.name) is None]
    return f"lacks {', '.join(missing)}" if whole and missing else ""


def misunderstood_lines(page: Page, command: Any) -> list[str]:
    """Every command line of a page that the real one would refuse, with its reason."""
    return [
        f"{page.path.name}: heliostat {' '.join(arguments)}: {reason}"
        for arguments, whole in commands(page, "heliostat")
        if (reason := misunderstood(command, arguments, whole=whole))
    ]


def test_every_command_line_of_the_pages_is_understood() -> None:
    command = real_command_line()
    assert [line for page in pages() for line in misunderstood_lines(page, command)] == []


def test_every_command_line_of_the_makefile_is_understood() -> None:
    command = real_command_line()
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = [line.split() for line in re.findall(r"^\t@?\$\(BIN\)/heliostat (.*)$", text, flags=re.MULTILINE)]
    assert [reason for line in lines if (reason := misunderstood(command, line, whole=True))] == []


def test_every_module_that_the_makefile_runs_exists() -> None:
    run = re.findall(r"-m (heliostat[\w.]*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert [name for name in run if name not in modules()] == []


def test_the_readme_shows_commands() -> None:
    assert len(list(commands(read(ROOT / "README.md"), "heliostat"))) >= 5


def test_every_link_of_the_pages_leads_somewhere() -> None:
    assert [link for page in pages() for link in broken_links(page)] == []


def test_every_verb_of_make_that_the_pages_name_exists() -> None:
    known = verbs((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {"demo", "test"} <= known
    assert [
        f"{p.path.name}: make {verb}" for p in pages() for verb in verbs_named(p) if verb not in known
    ] == []


# ---- the rules can fail


@pytest.fixture
def command() -> Any:
    """A small command line: ``train FOLDER --member NAME [--bf16]`` and ``member rm FOLDER``."""
    small, member = typer.Typer(), typer.Typer()

    @small.command()
    def train(folder: str, member: str = typer.Option(), bf16: bool = False) -> None: ...

    @member.command()
    def rm(folder: str) -> None: ...

    @member.command()
    def rename(folder: str) -> None: ...

    small.add_typer(member, name="member")
    return typer.main.get_command(small)


def page(folder: Path, text: str) -> Page:
    (folder / "page.md").write_text(text, encoding="utf-8")
    return read(folder / "page.md")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("heliostat train fam/ --membr x", "No such option"),
        ("heliostat trian fam/ --member x", "no command 'trian'"),
        ("heliostat train fam/", "lacks --member"),
        ("heliostat train --member x", "lacks folder"),
        ("heliostat train fam/ more --member x", "unexpected more"),
        ("heliostat member remove fam/", "no command 'remove'"),
        ("heliostat train fam/ --member", "requires an argument"),
        ("cd x && heliostat trian", "no command 'trian'"),
        ("heliostat train \\\n  fam/ --membr x", "No such option"),
    ],
)
def test_a_command_line_that_is_wrong_is_found(tmp_path: Path, command: Any, line: str, reason: str) -> None:
    (found,) = misunderstood_lines(page(tmp_path, f"# A page\n```\n{line}\n```\n"), command)
    assert reason in found


@pytest.mark.parametrize(
    "line",
    [
        "$ heliostat train fam/ --member x --bf16   # tunes it's half",
        "heliostat train fam/ --member 'a b' [--bf16]",
        "heliostat train fam/ ...",
        'heliostat train fam/ --member "..."',
        "heliostat member rm|rename fam/",
        "heliostat train --help",
        "heliostatic trian",
    ],
)
def test_a_command_line_that_is_right_is_not(tmp_path: Path, command: Any, line: str) -> None:
    assert misunderstood_lines(page(tmp_path, f"```bash\n{line}\n```\n"), command) == []


def test_in_the_middle_of_a_text_options_count_and_what_is_missing_does_not(
    tmp_path: Path, command: Any
) -> None:
    text = "Run `heliostat train`, then `heliostat train --membr x`; heliostat trian is no command line."
    assert [line.rsplit(": ")[1] for line in misunderstood_lines(page(tmp_path, text), command)] == [
        "heliostat train --membr x"
    ]


def test_a_broken_link_and_a_missing_heading_are_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# One heading, *here*\n", encoding="utf-8")
    text = (
        "# Top\n[a](there.md) [b](gone.md) [c](there.md#one-heading-here) [d](there.md#other) [e](#top)\n"
        '[f](https://example.org) <img src="gone.svg"> `[g](not-a-link.md)`\n```\n[h](nor-this.md)\n```\n'
    )
    assert broken_links(page(tmp_path, text)) == [
        "page.md: gone.md",
        "page.md: there.md#other",
        "page.md: gone.svg",
    ]
    assert anchors(tmp_path / "there.md") == {"one-heading-here"}


def test_the_verbs_of_make_are_read_where_they_are_typed(tmp_path: Path) -> None:
    text = "Do make sure: `make test`.\n```\n$ make demo PYTHON=python3.12   # make it\nmake -j gone\n```\n"
    assert sorted(verbs_named(page(tmp_path, text))) == ["demo", "gone", "test"]
    assert verbs("A := b\n.PHONY: x\ndemo: a  ## b\n\tcommand: x\ntest-slow: a\n") == {"demo", "test-slow"}
