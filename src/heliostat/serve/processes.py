"""Worker processes of this machine: what each is started with, how it is reached, and what must not stay behind."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

import zmq

from heliostat.build import best_dtype, device_named
from heliostat.engine.ledger import MIB, Ledger, available_memory
from heliostat.engine.plan import plan_of
from heliostat.engine.speculation.wanted import Wanted
from heliostat.engine.store import sweep
from heliostat.errors import Refused
from heliostat.family import Family
from heliostat.files import OWNER, hold, remove_abandoned
from heliostat.llm import parse_dtype
from heliostat.serve.cluster import DECODE, Cluster, Place
from heliostat.serve.dispatch import Dispatcher
from heliostat.serve.link import Wire
from heliostat.serve.link_client import RemoteWorker
from heliostat.serve.log import Log
from heliostat.serve.protocol import WorkerSettings
from heliostat.serve.supervisor import Supervisor
from heliostat.serve.worker_process import spawn

STORE = "heliostat-"
"""What the names of all servers' memory for pages begin with, and those of their folders."""
SILENT = 30.0
"""Seconds without any word after which a process is taken for dead."""
_LOOK = 0.05
"""Seconds between two looks whether a process is ready, or gone."""


@dataclass(frozen=True, slots=True)
class Means:
    """What the workers of a server have in common."""

    family: Path
    dtype: str = "auto"
    device: str = "cpu"
    cache_mib: int = 1024
    max_length: int | None = None
    max_running: int = 64
    wanted: Wanted = field(default_factory=Wanted)

    def drafts(self, place: Place) -> Wanted:
        """What the worker of a place drafts: who only reads prompts, nothing."""
        return self.wanted if DECODE in place.roles else Wanted()


class Process:
    """One worker's process, reached through its socket."""

    def __init__(self, process: Popen[bytes], worker: RemoteWorker) -> None:
        self._process, self.worker, self.number = process, worker, process.pid

    async def ended(self) -> str:
        """How it ended, when it has; one that is alive and says nothing is ended here."""
        why = ""
        while self._process.poll() is None:
            if not why and self.worker.silent > SILENT:
                why = f"said nothing for {SILENT:g} s"
                self.kill()
            await asyncio.sleep(_LOOK)
        why = why or _how(self._process)
        self.worker.lost(f"the worker {why}")
        await self._let_go()
        return why

    async def end(self) -> None:
        """It lives while somebody holds its input open."""
        await self._let_go()
        while self._process.poll() is None:
            await asyncio.sleep(_LOOK)

    async def _let_go(self) -> None:
        await self.worker.close()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def kill(self) -> None:
        """At once."""
        self._process.kill()


def _how(process: Popen[bytes]) -> str:
    status = process.returncode
    return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"


class Starter:
    """Starts processes in a folder of their own that nobody else can enter, and that goes with the server."""

    def __init__(self, means: Means, cluster: Cluster, caches: Mapping[str, int], log: Log) -> None:
        """``caches``: MiB for pages, by worker."""
        self._means, self._caches, self._log = means, caches, log
        self._share = max(1, (os.cpu_count() or 1) // len(cluster.places))
        self._folder = Path(tempfile.mkdtemp(prefix=STORE))
        self._held = [hold(self._folder / OWNER)]
        self._store = f"{STORE}{os.getpid()}-{secrets.token_hex(4)}"

    async def __call__(self, place: Place, modules: Mapping[str, str]) -> Process:
        """The worker of a place; raises ConnectionError where its process ends before it can be reached, OSError where
        this machine gives no process or no socket."""
        incarnation = secrets.token_hex(8)
        endpoint = self._folder / f"{place.name}-{incarnation}"
        settings = WorkerSettings(
            family=str(self._means.family.resolve()),
            worker=place.name,
            incarnation=incarnation,
            modules=modules,
            roles=place.roles,
            dtype=self._means.dtype,
            device=self._means.device,
            cache_mib=self._caches[place.name],
            max_length=self._means.max_length,
            max_running=self._means.max_running,
            threads=place.threads or self._share,
            endpoint=str(endpoint),
            store_prefix=self._store,
            wanted=self._means.drafts(place),
        )
        process = spawn(settings)
        try:
            while not endpoint.exists():
                if process.poll() is not None:
                    raise ConnectionError(_how(process))
                await asyncio.sleep(_LOOK)
            worker = RemoteWorker(Wire(endpoint, bind=False), log=self._log)
        except BaseException as error:
            with suppress(BrokenPipeError), process:  # waits: a sweep takes only what no living process holds
                process.kill()
            if isinstance(error, zmq.ZMQError):
                raise OSError(error.errno, str(error)) from error
            raise
        worker.start()
        return Process(process, worker)

    def sweep(self) -> None:
        """Remove memory that dead workers of ours left, and the folders of servers that were killed."""
        sweep(self._store)
        sweep_folders()

    def leave(self) -> None:
        """Remove the folder, too, and what servers left that were killed with their workers."""
        sweep(STORE)
        shutil.rmtree(self._folder, ignore_errors=True)
        while self._held:
            os.close(self._held.pop())


def sweep_folders() -> None:
    """Remove the folders for sockets and logs that servers left which were killed."""
    remove_abandoned(Path(tempfile.gettempdir()).glob(f"{STORE}*"))


def processes(
    cluster: Cluster, family: Family, dispatcher: Dispatcher, means: Means, *, tokenizer: str, log: Log
) -> Supervisor:
    """The crew of a cluster. Refused, with the numbers, where it does not fit into memory together."""
    if (device := device_named(means.device)) != "cpu":
        raise Refused(
            f"worker processes run on a CPU, and this would be {device}: say --device cpu, or let one process do all"
        )
    starter = Starter(means, cluster, caches_of(cluster, family, means), log)
    return Supervisor(
        cluster,
        {name: module.digest for name, module in family.modules.items()},
        starter,
        dispatcher,
        folder=means.family,
        tokenizer=tokenizer,
        log=log,
        sweep=starter.sweep,
        at_last=starter.leave,
    )


def caches_of(cluster: Cluster, family: Family, means: Means) -> dict[str, int]:
    """MiB for pages of each worker: those asked for, or what is left of the memory that its place gives it."""
    found, lines = {}, []
    device = device_named(means.device)
    for place in cluster.places:
        cache = means.cache_mib
        ledger = _ledger(place, family, means, cache)
        if place.memory is not None and ledger.total > place.memory * MIB:
            cache -= -(-(ledger.total - place.memory * MIB) // MIB)
            if cache < 1:
                ledger.refuse_over(place.memory * MIB, remedy=f"Give worker {place.name!r} more memory")
            ledger = _ledger(place, family, means, cache)
            ledger.refuse_over(place.memory * MIB, remedy=f"Give worker {place.name!r} more memory")
        found[place.name] = cache
        lines += [(f"{place.name}: {what}", size) for what, size in ledger.lines]
    remedy = "Start fewer workers, lower --cache-mib, or place modules by hand (--cluster)"
    Ledger(tuple(lines)).refuse_over(available_memory(device), remedy=remedy)
    return found


def _ledger(place: Place, family: Family, means: Means, cache: int) -> Ledger:
    device = device_named(means.device)
    dtype = best_dtype(device) if means.dtype == "auto" else parse_dtype(means.dtype)
    if not place.modules:
        raise Refused(f"worker {place.name!r} would host no module: leave it out, or name modules")
    plan = plan_of(
        means.family,
        family,
        place.modules,
        dtype=dtype,
        max_length=means.max_length,
        cache_mib=cache,
        max_running=means.max_running,
        wanted=means.drafts(place),
    )
    return plan.ledger
