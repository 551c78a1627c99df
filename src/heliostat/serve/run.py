"""From a family's folder to a server that listens, and to its end: signals, drain, exit status."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from heliostat.build import best_dtype, device_named, load_tokenizer, modules_of, read_family
from heliostat.engine.ledger import available_memory
from heliostat.engine.plan import plan_of
from heliostat.errors import Refused
from heliostat.family import BASE
from heliostat.llm import LLM, parse_dtype
from heliostat.serve.app import build
from heliostat.serve.connections import capped
from heliostat.serve.gate import host_names, is_loopback
from heliostat.serve.keys import Keys
from heliostat.serve.log import Log
from heliostat.serve.metrics import Metrics
from heliostat.serve.owner import Owner
from heliostat.serve.roster import Roster, Version
from heliostat.serve.service import Limits, Service
from heliostat.serve.shelf import Shelf

STOPPED_TWICE = 130
"""Exit status after a second signal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server is started. Raises Refused for what would let in anybody, or cannot work."""

    family: Path
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
    keys: Path | None = None
    allow_hosts: Sequence[str] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    drain: float = 30.0
    """Most seconds for requests in flight after SIGTERM."""
    max_body_mib: int = 8
    max_connections: int = 512
    """Most that may be open at once."""

    def __post_init__(self) -> None:
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
    """Load the members and put everything together; nothing listens yet."""
    keys = Keys.read(settings.keys) if settings.keys is not None else None
    family = read_family(settings.family)
    tokenizer = load_tokenizer(settings.family, family)
    device = device_named(settings.device)
    dtype = best_dtype(device) if settings.dtype == "auto" else parse_dtype(settings.dtype)
    names = list(dict.fromkeys(settings.members or [*family.members, BASE]))
    plan = plan_of(
        settings.family,
        family,
        modules_of(family, names),
        dtype=dtype,
        max_length=settings.max_length,
        cache_mib=settings.cache_mib,
        max_running=settings.max_running,
    )
    plan.ledger.refuse_over(available_memory(device))
    shelf = Shelf(settings.family, dtype, device, tokenizer.digest)
    rows = {}
    for name in names:
        arrival = shelf.read(name)
        shelf.put(arrival)
        rows[name] = arrival.row
    llm = LLM.of(
        shelf.held,
        rows,
        tokenizer,
        max_length=plan.max_length,
        cache_mib=settings.cache_mib,
        max_running=settings.max_running,
    )
    roster = Roster()
    for name, row in rows.items():
        digests = {module: llm.engine.digests[module] for module in row.modules}
        roster.add(Version(name, row, digests, name))
    owner = Owner(llm.engine, Metrics(names), max_waiting=settings.max_waiting, deadline=settings.deadline)
    return Service(
        tokenizer,
        roster,
        owner,
        shelf,
        keys,
        host_names(settings.allow_hosts),
        Limits(body=settings.max_body_mib * 2**20),
        log or Log(),
    )


def serve(settings: Settings, *, version: str) -> None:
    """Serve until a signal; returns when all requests have been answered, or the time for that is over."""
    with listen(settings.host, settings.port) as listening:
        service = service_of(settings)
        config = _config(settings, build(service, version=version))
        address = f"{'https' if settings.tls_cert else 'http'}://{_shown(listening)}"
        Listener(config, service, drain=settings.drain, address=address).run(sockets=[listening])
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
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Remember the loop: a signal may come at any moment."""
        self._loop = asyncio.get_running_loop()
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
        self._service.log.say("draining", unfinished=self._service.owner.unfinished)
        self._draining = asyncio.get_running_loop().create_task(self._finish())

    async def _finish(self) -> None:
        until = time.monotonic() + self._drain
        while self._service.in_flight and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self.should_exit = True
