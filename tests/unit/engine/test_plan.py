"""The plan of an engine is the one that it is then started with."""

from pathlib import Path

import pytest
import torch

from heliostat.build import modules_of, read_family
from heliostat.engine.plan import Plan, plan_of
from heliostat.errors import Refused
from heliostat.llm import LLM


def plan(folder: Path, **options: int | None) -> Plan:
    family = read_family(folder)
    given = {"max_length": None, "cache_mib": 1, "max_running": 4, **options}
    modules = modules_of(family, ["base", "plan"])
    return plan_of(folder, family, modules, dtype=torch.float32, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_length", [None, 48])
@pytest.mark.parametrize("max_running", [1, 4, 1000])
def test_it_is_what_the_engine_has(tiny_family: Path, max_length: int | None, max_running: int) -> None:
    found = plan(tiny_family, max_length=max_length, max_running=max_running)
    options = {"max_length": max_length, "cache_mib": 1, "max_running": max_running}
    engine = LLM(tiny_family, members=["base", "plan"], dtype="float32", **options).engine  # type: ignore[arg-type]
    assert (engine.max_length, engine.table.pages) == (found.max_length, found.pages)
    held = engine.runner.pool.keys.nbytes + engine.runner.pool.values.nbytes
    assert dict(found.ledger.lines)[f"{found.pages} pages of keys and values"] == held


def test_not_even_one_request(tiny_family: Path) -> None:
    with pytest.raises(Refused, match="raise it, or lower max_length"):
        plan(tiny_family, max_length=256, cache_mib=0)
