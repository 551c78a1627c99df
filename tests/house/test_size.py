"""Files and functions fit a glance, and every file's first line says what it is for."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.house.source import SourceFile, modules, place, written

FILE_LINES = 400
FUNCTION_LINES = 60


def too_long(files: Iterable[SourceFile]) -> list[str]:
    """Files and functions over their limits."""
    found = []
    for file in files:
        lines = len(file.text.splitlines())
        if lines > FILE_LINES:
            found.append(f"{file.name} has {lines} lines")
        for node in ast.walk(file.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    found.append(f"{place(file, node)} {node.name} has {length} lines")
    return found


def silent(files: Iterable[SourceFile]) -> list[str]:
    """Files whose first line does not say what they are for. An empty __init__ has nothing to say."""
    return [f.name for f in files if f.text.strip() and not _opening(f)]


def _opening(file: SourceFile) -> str:
    """The first line of the module's docstring, where the docstring stands in the first line of the file."""
    first = file.tree.body[0]
    after_shebang = 2 if file.text.startswith("#!") else 1
    documented = ast.get_docstring(file.tree)
    return documented.splitlines()[0].strip() if documented and first.lineno <= after_shebang else ""


def test_no_file_and_no_function_is_too_long() -> None:
    assert too_long(modules().values()) == []


def test_every_file_says_first_what_it_is_for() -> None:
    assert silent(modules().values()) == []


def test_a_long_file_and_a_long_function_are_found_and_the_longest_allowed_are_not(tmp_path: Path) -> None:
    def function(lines: int) -> str:
        return "def f():\n" + "    pass\n" * (lines - 1)

    known = written(
        tmp_path,
        {
            "a.py": "x = 1\n" * (FILE_LINES + 1),
            "b.py": "x = 1\n" * FILE_LINES,
            "c.py": function(FUNCTION_LINES + 1).replace("def", "async def"),
            "d.py": function(FUNCTION_LINES),
        },
    )
    assert too_long(known.values()) == ["heliostat.a has 401 lines", "heliostat.c:1 f has 61 lines"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('"""Says it."""\nx = 1', False),
        ('#!/usr/bin/env python3\n"""Says it."""', False),
        ("", False),
        ("x = 1", True),
        ('"""\nSays it a line late."""', False),
        ('""""""\nx = 1', True),
        ('import os\n"""Too late."""', True),
        ('# A comment first.\n"""Then it."""', True),
    ],
)
def test_a_file_that_does_not_say_it_first_is_found(tmp_path: Path, text: str, found: bool) -> None:
    assert silent(written(tmp_path, {"a.py": text}).values()) == (["heliostat.a"] if found else [])
