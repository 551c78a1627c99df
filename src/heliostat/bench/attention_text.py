"""Text for the comparison of attention kinds: articles of a wikitext file, and the documentation that Python brings.

The same files give the same three sets wherever they are read: to learn from, to choose rates by, and to report on.
What is held out of Python's documentation is whole files, of the encyclopaedia whole articles.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

from heliostat.errors import Refused
from heliostat.files import atomic_write_text

LEARN, CHOOSE, REPORT = "learn", "choose", "report"
SETS = (LEARN, CHOOSE, REPORT)
HELD_OUT = 16
"""One file of so many of Python's documentation is held out, and one more for the report."""
SHORTEST = 400
"""Characters of documentation below which a file is left out: most have a line or two."""
LOOKED_AT = 2_500
"""Characters of each held-out text that are read: many texts say more than a few long ones."""
_TITLE = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)
_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
)


def articles(path: Path) -> list[str]:
    """The articles of a wikitext file, titles included. Refused where it has none, or is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Refused(
            f"{path} is missing; give a raw wikitext file, whose titles are lines ' = Title = '"
        ) from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not UTF-8: byte at position {error.start}") from error
    starts = [match.start() for match in _TITLE.finditer(text)]
    if not starts:
        raise Refused(f"{path} has no article: a raw wikitext file has titles like ' = Title = '")
    return [text[a:b].strip() for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]


def documentation(library: Path | None = None) -> dict[str, str]:
    """Docstrings of each file of Python's library that has enough of them, and pydoc's topics, by name, sorted."""
    library = library or Path(sysconfig.get_path("stdlib"))
    found = {}
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if not _LEFT_OUT & set(inside.parts) and inside.parts[0] != "pydoc_data":
            found[inside.as_posix()] = "\n\n".join(_docstrings(path))
    from pydoc_data.topics import topics

    found |= {f"topics/{name}": text.strip() for name, text in topics.items()}
    return {name: text for name, text in sorted(found.items()) if len(text) >= SHORTEST}


def _docstrings(path: Path) -> Iterator[str]:
    """Of a file's module, classes and functions, in their order; none of a file that is not to be read."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda n: getattr(n, "lineno", 0)):
        text = ast.get_docstring(node)
        if text:
            yield f"{getattr(node, 'name', path.stem)}\n{text}"


def part_of(name: str) -> str:
    """The set of a file of Python's documentation: by its name alone."""
    number = hashlib.sha256(name.encode()).digest()[0] % HELD_OUT
    return {0: CHOOSE, 1: REPORT}.get(number, LEARN)


def gather(train: Path, validation: Path, library: Path | None = None) -> Mapping[str, list[str]]:
    """The three sets; of the validation file every other article is for the report."""
    sets: dict[str, list[str]] = {name: [] for name in SETS}
    sets[LEARN] += articles(train)
    held_out = articles(validation)
    sets[CHOOSE] += held_out[0::2]
    sets[REPORT] += held_out[1::2]
    for name, text in documentation(library).items():
        sets[part_of(name)].append(text)
    for name in (CHOOSE, REPORT):
        sets[name] = [text[:LOOKED_AT] for text in sets[name]]
    return sets


def write(folder: Path, train: Path, validation: Path) -> dict[str, Path]:
    """The three sets as jsonl in ``folder``, written once."""
    files = {name: folder / f"{name}.jsonl" for name in SETS}
    if not all(path.exists() for path in files.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for name, texts in gather(train, validation).items():
            atomic_write_text(files[name], "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return files
