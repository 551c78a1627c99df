"""Nothing in the package runs code out of a file. Read from the syntax tree: comments do not count."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.house.source import SourceFile, modules, place, written

MODULES = frozenset({"pickle", "_pickle", "cPickle", "dill", "marshal", "cloudpickle", "shelve", "joblib"})
CALLS = frozenset(
    {
        "torch.load",
        "torch.save",
        "torch.jit.load",
        "torch.hub.load",
        "torch.serialization.load",
        "torch.serialization.save",
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.load_all",
        "yaml.full_load",
        "yaml.unsafe_load",
        "builtins.eval",
        "builtins.exec",
        "builtins.compile",
        "builtins.__import__",
    }
)
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
KEYWORDS = frozenset({"trust_remote_code", "shell", "allow_pickle"})


def dangers(files: Iterable[SourceFile]) -> list[str]:
    """Every use of what can run code out of a file or a text."""
    return [f"{place(file, node)} {what}" for file in files for node, what in _dangers(file)]


def _dangers(file: SourceFile) -> Iterator[tuple[ast.AST, str]]:
    aliases = _aliases(file.tree)
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node, name) for name in _imported(node) if _forbidden(name))
        elif isinstance(node, ast.Name) and node.id in BUILTINS:
            yield node, node.id
        elif isinstance(node, ast.Attribute) and (name := _dotted(node, aliases)) in CALLS:
            yield node, name
        elif isinstance(node, ast.Call):
            pairs = [(k.arg, k.value) for k in node.keywords]
            yield from (
                (node, f"{name}=") for name, value in pairs if name in KEYWORDS and not _is_false(value)
            )
        elif isinstance(node, ast.Dict):
            keys = [k.value if isinstance(k, ast.Constant) else None for k in node.keys]
            named = [(key, value) for key, value in zip(keys, node.values, strict=True) if key in KEYWORDS]
            yield from ((node, f"{key!r}:") for key, value in named if not _is_false(value))


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def _forbidden(name: str) -> bool:
    return name.partition(".")[0] in MODULES or name in CALLS


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Names under which modules go in a file: ``import torch as t`` makes ``t`` torch."""
    return {
        alias.asname: name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias, name in zip(node.names, _imported(node), strict=True)
        if alias.asname
    }


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


def test_nothing_in_the_package_runs_code_out_of_a_file() -> None:
    assert dangers(modules().values()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    from dill import loads",
        "import os, marshal as m",
        "import cloudpickle.something",
        "import shelve",
        "import torch\ntorch.load('x')",
        "import torch as t\nt.save(x, 'x')",
        "load = torch.load",
        "from torch import load",
        "from torch.jit import load as read",
        "from torch import serialization as s\ns.load('x')",
        "eval('1')",
        "f = exec",
        "import builtins\nbuiltins.eval('1')",
        "compile('1', 'x', 'eval')",
        "yaml.load(text)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=wanted)",
        "options = {'trust_remote_code': True}",
        "subprocess.run('ls', shell=True)",
        "numpy.load(x, allow_pickle=True)",
        "os.system('ls')",
    ],
)
def test_what_can_run_code_is_found_however_it_is_written(tmp_path: Path, text: str) -> None:
    assert len(dangers(written(tmp_path, {"a.py": text}).values())) == 1


@pytest.mark.parametrize(
    "text",
    [
        "import re\nre.compile('x')",
        "import torch\ntorch.compile(model)\nmodel.eval()",
        "AutoModel.from_pretrained(x, trust_remote_code=False)",
        "# import pickle, eval, torch.load",
        "raise ValueError('this is a pickle, and torch.load is not used')",
        "yaml.safe_load(text)",
        "from heliostat.train.checkpoint import save, load",
        "subprocess.run(['ls'], shell=False)",
    ],
)
def test_what_only_looks_like_it_is_not(tmp_path: Path, text: str) -> None:
    assert dangers(written(tmp_path, {"a.py": text}).values()) == []
