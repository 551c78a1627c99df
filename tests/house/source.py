"""Reads the package's source for the rules of the house: modules, imports, functions. Runs nothing of it."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PACKAGE = "heliostat"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One module: its dotted name, where it lies, its text and its syntax tree."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def package(self) -> str:
        """The package that relative imports of this module start from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


def modules(source: Path = SOURCE) -> dict[str, SourceFile]:
    """Every module of the package under ``source``, by dotted name; the project's own are read once."""
    return dict(_own()) if source == SOURCE else _read(source)


@cache
def _own() -> dict[str, SourceFile]:
    return _read(SOURCE)


def _read(source: Path) -> dict[str, SourceFile]:
    found = {}
    for path in sorted((source / PACKAGE).rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found[name] = SourceFile(name, path, text, ast.parse(text, str(path)))
    return found


def written(folder: Path, files: Mapping[str, str]) -> dict[str, SourceFile]:
    """The modules of a made-up package, for a rule to fail on: ``{"engine/a.py": "import torch"}``."""
    for name, text in files.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return modules(folder)


def imports(file: SourceFile, known: Mapping[str, SourceFile]) -> set[str]:
    """Dotted names of all that a module imports: at the top, deferred, for types only, by ``import_module``.

    A name of this package is the module it lies in; any other is as it stands.
    """
    return {_module(name, known) for name in _imported_names(file)}


def _imported_names(file: SourceFile) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(file, node)
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            yield from (
                a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)
            )


def _origin(file: SourceFile, node: ast.ImportFrom) -> str:
    if node.level == 0:
        return node.module or ""
    parts = file.package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _module(name: str, known: Mapping[str, SourceFile]) -> str:
    """The longest beginning of ``name`` that is a module; ``name`` itself where none is."""
    parts = name.split(".")
    beginnings = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((beginning for beginning in beginnings if beginning in known), name)


def place(file: SourceFile, node: ast.AST) -> str:
    """Where something stands, for a message."""
    return f"{file.name}:{getattr(node, 'lineno', 1)}"
