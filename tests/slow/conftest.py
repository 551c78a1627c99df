"""What slow tests share: a family on the embedded base, with a member of every sharing."""

import shutil
from collections.abc import Callable, Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import SHARED
from tests.slow.process import served


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


@pytest.fixture(scope="module")
def address(tiny_family_made: Path) -> Iterator[str]:
    """A server of the tiny family, as clients of OpenAI call it."""
    with served(tiny_family_made, "--cache-mib", "16") as (found, _):
        yield f"{found}/v1"


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as made:
        yield made
