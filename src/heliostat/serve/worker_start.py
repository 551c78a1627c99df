"""From settings to a worker: what the folder holds is checked, weighed against memory, loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from heliostat.build import best_dtype, device_named, load_tokenizer, read_family
from heliostat.engine.engine import Engine
from heliostat.engine.ledger import MIB, available_memory
from heliostat.engine.plan import plan_of
from heliostat.engine.speculation.loading import drafting_of
from heliostat.errors import Refused
from heliostat.llm import parse_dtype
from heliostat.serve.protocol import WorkerSettings
from heliostat.serve.roster import family_name
from heliostat.serve.shelf import Shelf
from heliostat.serve.worker import EngineWorker
from heliostat.serve.worker_core import Core
from heliostat.serve.worker_drive import Drive
from heliostat.serve.worker_lending import Terms


def worker_of(settings: WorkerSettings, *, drive: Drive | None = None) -> EngineWorker:
    """A worker around an engine in this process; it does not work yet.

    Refused where a module is not what it should be, or where it all does not fit into memory.
    """
    folder = Path(settings.family)
    family = read_family(folder)
    tokenizer = load_tokenizer(folder, family)
    device = device_named(settings.device)
    dtype = best_dtype(device) if settings.dtype == "auto" else parse_dtype(settings.dtype)
    if not settings.modules:
        raise Refused(f"worker {settings.worker!r} hosts no module; name at least one")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    plan = plan_of(
        folder,
        family,
        list(settings.modules),
        dtype=dtype,
        max_length=settings.max_length,
        cache_mib=settings.cache_mib,
        max_running=settings.max_running,
        wanted=settings.wanted,
    )
    limit = available_memory(device) if settings.memory_mib is None else settings.memory_mib * MIB
    plan.ledger.refuse_over(limit)
    shelf = Shelf(folder, dtype, device, tokenizer.digest)
    shelf.put(shelf.read_modules(settings.modules))
    drafting = drafting_of(
        settings.wanted,
        folder,
        family,
        settings.modules,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        models={family_name(weights): model for weights, model in shelf.models.items()},
    )
    engine = Engine(
        shelf.held,
        tokenizer,
        max_length=plan.max_length,
        pages=plan.pages,
        max_running=settings.max_running,
        share=(settings.store, settings.incarnation) if settings.hands else None,
        drafting=drafting,
    )
    terms = Terms(
        worker=settings.worker,
        incarnation=settings.incarnation,
        roles=settings.roles,
        lease=settings.lease,
        credit=settings.credit,
    )
    return EngineWorker(Core(engine, terms), drive=drive, shelf=shelf)
