"""A toy family with a draft that says other things than its base, and prompts with answers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from heliostat.build import describe_module, read_family, write_family


@pytest.fixture(scope="session")
def drafted_made(
    tmp_path_factory: pytest.TempPathFactory, tiny_family_made: Path, make_checkpoint: Callable[..., Path]
) -> Path:
    """The family that ``drafted`` copies. Read only."""
    folder = Path(shutil.copytree(tiny_family_made, tmp_path_factory.mktemp("drafted") / "fam"))
    add_draft(folder, "small", make_checkpoint(seed=5, num_hidden_layers=1))
    return folder


def add_draft(folder: Path, name: str, checkpoint: Path) -> None:
    """One more module of the family, whole, as it lies there."""
    shutil.copytree(checkpoint, folder / "modules" / name)
    family = read_family(folder)
    module = describe_module(folder, name, f"modules/{name}", base=None, family=family)
    write_family(folder, family.with_module(module))


@pytest.fixture
def drafted(drafted_made: Path, tmp_path: Path) -> Path:
    """A toy family with the module ``small``, the test's own to change."""
    return Path(shutil.copytree(drafted_made, tmp_path / "fam"))


@pytest.fixture(scope="session")
def asked_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 prompts without answers. Read only."""
    path = tmp_path_factory.mktemp("asked") / "prompts.jsonl"
    items = [{"prompt": f"add {a} and {b}"} for a in range(5) for b in range(4)]
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path
