"""From a folder to a worker that hosts what it should, and what it refuses; modules that come and go."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from heliostat.build import read_family
from heliostat.clock import run_virtual
from heliostat.errors import Refused
from heliostat.serve.protocol import WorkerSettings
from heliostat.serve.worker import EngineWorker
from heliostat.serve.worker_drive import Paced
from heliostat.serve.worker_start import worker_of


def settings_of(folder: Path, *modules: str, **more: Any) -> WorkerSettings:
    """A worker that hosts these, with a small pool."""
    family = read_family(folder)
    digests = {name: family.module(name).digest for name in modules}
    facts: dict[str, Any] = {
        "family": str(folder),
        "worker": "w",
        "incarnation": secrets.token_hex(4),
        "modules": digests,
        "dtype": "float32",
        "cache_mib": 4,
        "store_prefix": "heliostat-test",
        **more,
    }
    return WorkerSettings(**facts)


def with_worker(settings: WorkerSettings, work: Callable[[EngineWorker], Awaitable[None]]) -> None:
    async def story() -> None:
        worker = worker_of(settings, drive=Paced(0.001))
        worker.start()
        try:
            await work(worker)
        finally:
            await worker.close()

    run_virtual(story())


def test_it_is_what_its_settings_say(tiny_family_made: Path) -> None:
    settings = settings_of(tiny_family_made, "base", "plan.own", roles=("prefill",), credit=3, lease=1.5)
    before = torch.get_num_threads()

    async def work(worker: EngineWorker) -> None:
        told = await worker.describe()
        assert {name.partition("#")[0] for name in told.modules} == {"base", "plan.own"}
        assert (told.worker, told.incarnation) == ("w", settings.incarnation)
        assert (told.roles, told.credit, told.hands, told.dtype) == (("prefill",), 3, True, "float32")
        assert told.pages * told.page_bytes <= 4 * 2**20
        assert Path(f"/dev/shm/{settings.store}").exists()

    with_worker(settings, work)
    assert not Path(f"/dev/shm/{settings.store}").exists()
    assert torch.get_num_threads() == before, "nobody asked for a number of threads"


def test_workers_of_one_family_fit_and_of_another_do_not(
    tiny_family_made: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from heliostat.build import init_family

    other = tmp_path / "other"
    init_family(other, make_checkpoint(seed=1, rope_parameters={"rope_type": "default", "rope_theta": 500.0}))
    fits = []

    async def work(worker: EngineWorker) -> None:
        fits.append((await worker.describe()).fit)

    for folder, module, dtype in (
        (tiny_family_made, "base", "float32"),
        (tiny_family_made, "math.own", "float32"),
        (tiny_family_made, "base", "bfloat16"),
        (other, "base", "float32"),
    ):
        with_worker(settings_of(folder, module, dtype=dtype, hands=False), work)
    assert fits[0] == fits[1] and len(set(fits)) == 3


def test_modules_come_and_go_by_name_and_digest(tiny_family_made: Path) -> None:
    family = read_family(tiny_family_made)

    async def work(worker: EngineWorker) -> None:
        told = await worker.load({"plan.own": family.module("plan.own").digest})
        (name,) = (name for name in told.modules if name.startswith("plan.own#"))
        assert name == f"plan.own#{family.module('plan.own').digest[:12]}"
        with pytest.raises(Refused, match="asked for with digest"):
            await worker.load({"math.own": "0" * 64})
        with pytest.raises(Refused, match="no module"):
            await worker.load({"nobody": "0" * 64})
        assert (await worker.describe()).modules == told.modules, "and nothing is changed"
        told = await worker.unload([name])
        assert {name.partition("#")[0] for name in told.modules} == {"base"}
        assert worker.shelf is not None and set(worker.shelf.held) == set(told.modules)

    with_worker(settings_of(tiny_family_made, "base", hands=False), work)


def test_what_cannot_be_met_is_refused(tiny_family_made: Path) -> None:
    base = settings_of(tiny_family_made, "base")
    for wrong, why in (
        ({"modules": {}}, "hosts no module"),
        ({"modules": {"base": "0" * 64}}, "asked for with digest"),
        ({"memory_mib": 1}, "does not fit into memory"),
    ):
        with pytest.raises(Refused, match=why):
            worker_of(msgspec.structs.replace(base, **wrong))
    assert not Path(f"/dev/shm/{base.store}").exists()


def test_after_its_end_it_answers_nothing(tiny_family_made: Path) -> None:
    async def story() -> None:
        worker = worker_of(settings_of(tiny_family_made, "base", hands=False))
        worker.start()
        await worker.describe()
        await worker.close()
        with pytest.raises(ConnectionError):
            await worker.describe()

    asyncio.run(asyncio.wait_for(story(), 60))
