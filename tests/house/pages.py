"""Reads the pages of the repository: the command lines they show, the verbs of make they name, links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.house.source import ROOT

FENCE = re.compile(r"^\s*(```|~~~)")
SPAN = re.compile(r"`([^`\n]+)`")
LEFT_OUT = re.compile(r"(?<=\s)\.\.\.(?=\s|$)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)|\b(?:src|href)=\"([^\"]+)\"")


@dataclass(frozen=True, slots=True)
class Page:
    """A Markdown file, its fenced lines (continued ones joined) and the text between the fences."""

    path: Path
    fenced: tuple[str, ...]
    prose: str

    @property
    def spans(self) -> list[str]:
        """What stands in single backticks."""
        return SPAN.findall(self.prose)

    @property
    def links(self) -> list[str]:
        """Targets of links and pictures that are not on the web."""
        found = [a or b for a, b in LINK.findall(SPAN.sub("", self.prose))]
        return [link for link in found if not re.match(r"[a-z]+:", link)]


def pages(root: Path = ROOT) -> list[Page]:
    """The repository's own pages."""
    return [read(path) for path in sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")])]


def read(path: Path) -> Page:
    """The page in a file."""
    fenced: list[str] = []
    prose: list[str] = []
    inside = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if FENCE.match(line):
            inside = not inside
        elif inside and fenced and fenced[-1].endswith("\\"):
            fenced[-1] = f"{fenced[-1][:-1]} {line.strip()}"
        else:
            (fenced if inside else prose).append(line)
    return Page(path, tuple(fenced), "\n".join(prose))


def commands(page: Page, program: str) -> Iterator[tuple[list[str], bool]]:
    """(arguments, whole) of every line that runs ``program``.

    Not whole is what stands in the middle of a text, leaves something out (``...``) or asks for help.
    """
    for lines, whole in ((page.fenced, True), (page.spans, False)):
        for line in lines:
            for part in line.removeprefix("$ ").split("&&"):
                found = _words(LEFT_OUT.sub("", part))
                if found and found[0] == program:
                    yield found[1:], whole and not LEFT_OUT.search(part) and "--help" not in found


def _words(line: str) -> list[str]:
    """A line's words, without its comment, and without the brackets and bars of ``[--as sun|icarus]``."""
    try:
        found = shlex.split(line, comments=True)
    except ValueError:  # no command line at all: an apostrophe in a text, for instance
        return []
    return [word.strip("[]").split("|")[0] for word in found]


def anchors(path: Path) -> set[str]:
    """The names under which a page's headings can be linked to."""
    headings = re.findall(r"^#+\s+(.+?)\s*$", read(path).prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Page) -> list[str]:
    """Links to files or headings that are not there."""
    found = []
    for link in page.links:
        name, _, anchor = link.partition("#")
        target = page.path.parent / name if name else page.path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            found.append(f"{page.path.name}: {link}")
    return found


def verbs(makefile: str) -> set[str]:
    """The targets of a Makefile's text."""
    return set(re.findall(r"^([A-Za-z][\w-]*)\s*:(?!=)", makefile, flags=re.MULTILINE))


def verbs_named(page: Page) -> list[str]:
    """The verbs of make that a page tells its reader to type."""
    return [
        word for words, _ in commands(page, "make") for word in words if re.fullmatch(r"[a-z][\w-]*", word)
    ]
