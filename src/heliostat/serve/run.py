"""From a family's folder to a server that listens, and to its end: signals, drain, exit status."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from heliostat.build import load_tokenizer, modules_of, read_family, verify_member
from heliostat.engine.speculation.wanted import Wanted
from heliostat.errors import Refused
from heliostat.family import BASE, Family, Row
from heliostat.serve.app import build
from heliostat.serve.cluster import DECODE, EMBEDDED, ENGINES, PREFILL, VLLM, Cluster, Terms, laid_out
from heliostat.serve.cluster import read as read_cluster
from heliostat.serve.connections import capped
from heliostat.serve.crew import Alone, Crew, named
from heliostat.serve.dispatch import Dispatcher
from heliostat.serve.gate import host_names, is_loopback
from heliostat.serve.http_layout import groups_of, with_modules
from heliostat.serve.http_processes import servers
from heliostat.serve.keys import Keys
from heliostat.serve.log import Log
from heliostat.serve.metrics import Metrics
from heliostat.serve.processes import Means, processes
from heliostat.serve.protocol import WorkerSettings
from heliostat.serve.service import Limits, Service
from heliostat.serve.worker_start import worker_of

HERE = "here"
"""Name of the one worker of a server without worker processes."""
STOPPED_TWICE = 130
"""Exit status after a second signal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server is started. Raises Refused for what would let in anybody, or cannot work."""

    family: Path | None = None
    """None: the cluster file names it."""
    cluster: Path | None = None
    """File that says which worker hosts what."""
    prefill_workers: int | None = None
    """Worker processes by what they do; None: one process does all."""
    decode_workers: int | None = None
    engine: str = EMBEDDED
    """What worker processes are; a cluster file says it itself."""
    host: str = "127.0.0.1"
    port: int = 8000
    members: Sequence[str] | None = None
    """None: all of them, and the base."""
    dtype: str = "auto"
    device: str = "cpu"
    cache_mib: int = 1024
    max_length: int | None = None
    max_running: int = 64
    max_waiting: int = 256
    deadline: float | None = None
    """Most seconds for a request."""
    patience: float = 60.0
    """Most seconds for which a request waits while no worker is there for it."""
    keys: Path | None = None
    allow_hosts: Sequence[str] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    drain: float = 30.0
    """Most seconds for requests in flight after SIGTERM."""
    max_body_mib: int = 8
    max_connections: int = 512
    """Most that may be open at once."""
    wanted: Wanted = field(default_factory=Wanted)
    """What is drafted, and by which rules it may be taken."""

    def __post_init__(self) -> None:
        counts = (self.prefill_workers, self.decode_workers)
        if self.cluster is not None and counts != (None, None):
            raise Refused(
                "--cluster says which workers there are: leave --prefill-workers and --decode-workers out"
            )
        if self.engine not in ENGINES:
            raise Refused(f"--engine {self.engine}: there is {', '.join(ENGINES)}")
        if self.cluster is not None and self.engine != EMBEDDED:
            raise Refused("--cluster says which engine there is (spawn: vllm, or url): leave --engine out")
        if self.family is None and self.cluster is None:
            raise Refused("give the family's folder, or a --cluster file that names it")
        if not is_loopback(self.host) and self.keys is None:
            raise Refused(
                f"--host {self.host} can be reached from other machines, and without keys anybody could ask: "
                "give --keys FILE, or bind 127.0.0.1"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise Refused("--tls-cert and --tls-key come together: give both, or neither")
        for path in (self.tls_cert, self.tls_key):
            if path is not None and not path.is_file():
                raise Refused(f"{path} is not there: --tls-cert and --tls-key take PEM files")


def service_of(settings: Settings, *, log: Log | None = None) -> Service:
    """Read what is to be served and put everything together; one process loads its weights here, nothing listens yet."""
    keys = Keys.read(settings.keys) if settings.keys is not None else None
    log = log or Log()
    folder, family, rows, cluster = _planned(settings)
    tokenizer = load_tokenizer(folder, family)
    dispatcher = Dispatcher(
        Metrics(rows),
        max_waiting=settings.max_waiting,
        deadline=settings.deadline,
        patience=settings.patience,
    )
    if cluster is None:
        digests = {name: family.module(name).digest for name in modules_of(family, rows)}
        worker = worker_of(_alone(settings, folder, digests))
        crew: Crew = Alone(worker, HERE, dispatcher, folder, tokenizer.digest)
    elif cluster.engine == VLLM:
        crew = servers(
            cluster, family, rows, dispatcher, _means(settings, folder), tokenizer=tokenizer, log=log
        )
    else:
        crew = processes(
            cluster, family, dispatcher, _means(settings, folder), tokenizer=tokenizer.digest, log=log
        )
    return Service(
        tokenizer,
        dispatcher,
        crew,
        {name: named(family, row) for name, row in rows.items()},
        keys=keys,
        hosts=host_names(settings.allow_hosts),
        limits=Limits(body=settings.max_body_mib * 2**20),
        log=log,
        wanted=settings.wanted,
    )


def cluster_text(settings: Settings) -> str:
    """The cluster that these settings make, as a file that would make it."""
    folder, _, _, cluster = _planned(settings)
    if cluster is None:
        raise Refused(
            "one process does all: there is no cluster; give --prefill-workers and --decode-workers"
        )
    return replace(cluster, family=str(folder)).to_yaml()


def _planned(settings: Settings) -> tuple[Path, Family, dict[str, Row], Cluster | None]:
    """The family and where it lies, the rows that are served, and by which workers; None: by this process."""
    cluster = None
    if settings.cluster is not None:
        cluster = read_cluster(settings.cluster)
    elif (settings.prefill_workers, settings.decode_workers) != (None, None) and settings.engine == EMBEDDED:
        cluster = laid_out(prefill=settings.prefill_workers or 0, decode=settings.decode_workers or 0)
    folder = _folder(settings, cluster).resolve()  # as workers name it, whose messages must not show it
    family = read_family(folder)
    rows = {name: family.row(name) for name in settings.members or [*family.members, BASE]}
    for name in family.members.keys() & rows.keys():
        verify_member(family, name, folder=folder)
    if settings.engine == VLLM:
        cluster = _dealt(settings, family, rows)
    if cluster is not None:
        cluster.refuse_unreachable()
        if cluster.engine == VLLM:
            cluster = with_modules(cluster, family, rows)
        cluster = cluster.filled(rows)
        cluster.refuse_unplayable(family, rows)
    return folder, family, rows, cluster


def _dealt(settings: Settings, family: Family, rows: Mapping[str, Row]) -> Cluster:
    """vLLM servers of this machine; as many of a role as it has sets of weights, where nobody says how many."""
    prefill, decode = (
        count if count is not None else len(groups_of(family, rows, role))
        for count, role in ((settings.prefill_workers, PREFILL), (settings.decode_workers, DECODE))
    )
    terms = Terms(max_length=settings.max_length, dtype=None if settings.dtype == "auto" else settings.dtype)
    return laid_out(prefill=prefill, decode=decode, engine=VLLM, terms=terms)


def _folder(settings: Settings, cluster: Cluster | None) -> Path:
    """The family's; a relative path in a cluster file is meant from where the file lies."""
    if settings.family is not None:
        return settings.family
    assert settings.cluster is not None and cluster is not None
    if cluster.family is None:
        raise Refused(
            f"{settings.cluster} names no family: add a line `family: FOLDER`, or give the folder, too"
        )
    return settings.cluster.parent / cluster.family


def _alone(settings: Settings, folder: Path, digests: Mapping[str, str]) -> WorkerSettings:
    return WorkerSettings(
        family=str(folder),
        worker=HERE,
        incarnation="1",
        modules=digests,
        dtype=settings.dtype,
        device=settings.device,
        cache_mib=settings.cache_mib,
        max_length=settings.max_length,
        max_running=settings.max_running,
        hands=False,
        wanted=settings.wanted,
    )


def _means(settings: Settings, folder: Path) -> Means:
    return Means(
        family=folder,
        dtype=settings.dtype,
        device=settings.device,
        cache_mib=settings.cache_mib,
        max_length=settings.max_length,
        max_running=settings.max_running,
        wanted=settings.wanted,
    )


def serve(settings: Settings, *, version: str) -> None:
    """Serve until a signal; returns when all requests have been answered, or the time for that is over."""
    with listen(settings.host, settings.port) as listening:
        service = service_of(settings)
        config = _config(settings, build(service, version=version))
        address = f"{'https' if settings.tls_cert else 'http'}://{_shown(listening)}"
        listener = Listener(config, service, drain=settings.drain, address=address)
        listener.run(sockets=[listening])
        if listener.refused is not None:
            raise listener.refused
        service.log.say("stopped")


def _config(settings: Settings, app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=capped(settings.max_connections),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        # Requests in flight are waited for before uvicorn is told to stop.
        timeout_graceful_shutdown=1,
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
    )


def _shown(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound before anything is loaded: a taken port is told in a moment, not in minutes."""
    kind = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(kind, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise Refused(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
    return made


class Listener(uvicorn.Server):
    """uvicorn's server that goes on listening while it drains, so that probes learn of it."""

    def __init__(self, config: uvicorn.Config, service: Service, *, drain: float, address: str) -> None:
        super().__init__(config)
        self._service, self._drain, self._address = service, drain, address
        self._starting: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.refused: Refused | None = None
        """Why it could not start."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the workers, then listen. A signal may come at any moment: it ends the start, too."""
        self._loop = asyncio.get_running_loop()
        self._starting = self._loop.create_task(self._service.start())
        await asyncio.wait([self._starting])
        if self._starting.cancelled() or self._starting.exception() is not None:
            await self._service.stop()
            self.should_exit = True
            error = None if self._starting.cancelled() else self._starting.exception()
            if error is not None and not isinstance(error, Refused):
                raise error
            self.refused = error
            return
        await super().startup(sockets=sockets)
        # Only now: whoever reads it may connect at once.
        self._service.log.say("listening", address=self._address, members=list(self._service.roster))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal: finish what is in flight. The second: end at once."""
        if self._service.draining:
            sys.stderr.flush()
            os._exit(STOPPED_TWICE)  # a step may take long, and nothing here wants to be saved
        self._service.draining = True
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._service.log.say("draining", unfinished=self._service.dispatcher.unfinished)
        if self._starting is not None:
            self._starting.cancel()  # nothing, if it has started
        self._draining = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        until = time.monotonic() + self._drain
        while self._service.in_flight and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self.should_exit = True
