"""What slow tests share: a family on the embedded base, with a member of every sharing."""

import shutil
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SHARED


@pytest.fixture(scope="session")
def embedded_family(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tune_member: Callable[..., Any]
) -> Path:
    """The embedded base and members that were hardly tuned: they answer as it does. Read only."""
    from heliostat.build import init_family

    folder = tmp_path_factory.mktemp("embedded")
    with as_file(files("heliostat") / "assets" / "base") as base:
        init_family(folder / "fam", Path(shutil.copytree(base, folder / "base")))
    for member, (sharing, tuner) in SHARED.items():
        tune_member(folder / "fam", member, sharing, tiny_data, tuner=tuner, max_steps=2, learning_rate=1e-5)
    return folder / "fam"
