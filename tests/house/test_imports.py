"""Imports only go down the floors of the house and never in a circle; deferred and type-only ones count."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.house.source import PACKAGE, SourceFile, imports, modules, written

# The longest beginning of a module's name decides. A new module on the package's first level gets a line.
FLOORS = {
    "heliostat.errors": 0,
    "heliostat.card": 2,
    "heliostat.clock": 1,
    "heliostat.family": 1,
    "heliostat.files": 1,
    "heliostat.ops": 1,
    "heliostat.plot": 1,
    "heliostat.survey": 2,
    "heliostat.tasks": 1,
    "heliostat.linear": 2,
    "heliostat.model": 2,
    "heliostat.build": 3,
    "heliostat.engine": 3,
    "heliostat.export": 4,
    "heliostat.llm": 4,
    "heliostat.judging": 4,
    "heliostat.quantize": 4,
    "heliostat.serve": 4,
    "heliostat.train": 4,
    "heliostat.vllm": 4,
    "heliostat.bench": 5,
    "heliostat.check": 5,
    "heliostat.cli": 5,
    "heliostat.assets": 5,  # data, and a script that stands alone in an exported folder
    "heliostat": 5,  # its __init__, the face: it knows what is below, and nothing below knows it
}
# Neighbours on one floor that do not know each other all the same.
STRANGERS = [("heliostat.serve", "heliostat.train")]


def part(module: str) -> str | None:
    """The entry of FLOORS that a module belongs to; None where there is none."""
    found = [name for name in FLOORS if name != PACKAGE and f"{module}.".startswith(f"{name}.")]
    return max(found, key=len, default=PACKAGE if module == PACKAGE else None)


def breaches(known: Mapping[str, SourceFile]) -> list[str]:
    """Every import that goes up, crosses to a stranger, or starts from a module without a floor."""
    found = []
    for module, file in known.items():
        own = part(module)
        if own is None:
            found.append(
                f"{module} has no floor: give it a line in FLOORS, and keep docs/architecture.md true"
            )
            continue
        for target in sorted(imports(file, known) & known.keys() - {module}):
            other = part(target)
            if other is None:
                continue
            if FLOORS[other] > FLOORS[own]:
                found.append(f"{module} (floor {FLOORS[own]}) imports {target} (floor {FLOORS[other]})")
            elif (own, other) in STRANGERS or (other, own) in STRANGERS:
                found.append(f"{module} imports its neighbour {target}")
    return found


def circle(known: Mapping[str, SourceFile]) -> list[str]:
    """Modules that import each other in a circle, in order; empty where there is none."""
    graph = {name: sorted(imports(file, known) & known.keys() - {name}) for name, file in known.items()}
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        found = next(filter(None, map(visit, graph[name])), [])
        path.pop()
        done.add(name)
        return found

    return next(filter(None, map(visit, graph)), [])


def test_imports_only_go_down() -> None:
    assert breaches(modules()) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert " -> ".join(circle(modules())) == ""


@pytest.mark.parametrize(
    "line",
    [
        "from heliostat.train import loop",
        "from heliostat.train.loop import Run",
        "import heliostat.train.loop",
        "from ..train.loop import Run",
        "from .. import train",
        "def later():\n    from heliostat.train.loop import Run",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from heliostat.train.loop import Run",
        "import importlib\nimportlib.import_module('heliostat.train.loop')",
        "from heliostat import __version__",
    ],
)
def test_an_import_that_goes_up_is_found_however_it_is_written(tmp_path: Path, line: str) -> None:
    files = {"engine/a.py": line, "train/loop.py": "", "train/__init__.py": "", "__init__.py": ""}
    assert len(breaches(written(tmp_path, files))) == 1


def test_an_import_that_goes_down_or_sideways_is_not(tmp_path: Path) -> None:
    files = {"engine/a.py": "from heliostat.engine.b import x\nimport heliostat.family", "engine/b.py": ""}
    assert breaches(written(tmp_path, {**files, "family.py": "import os"})) == []


def test_a_stranger_on_the_same_floor_and_a_module_without_floor_are_found(tmp_path: Path) -> None:
    known = written(tmp_path, {"serve/a.py": "import heliostat.train.b", "train/b.py": "", "common.py": ""})
    found = breaches(known)
    assert [line.split()[0] for line in found] == ["heliostat.common", "heliostat.serve.a"]


def test_a_circle_is_found_also_where_an_import_is_deferred(tmp_path: Path) -> None:
    files = {
        "ops/a.py": "import heliostat.ops.b",
        "ops/b.py": "from heliostat.ops.c import x",
        "ops/c.py": "def f():\n    from heliostat.ops import a",
    }
    assert circle(written(tmp_path, files)) == [*(f"heliostat.ops.{m}" for m in "abc"), "heliostat.ops.a"]
