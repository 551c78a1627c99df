"""An application of Ray Serve out of a rendered configuration: each vLLM server a deployment, and our server in front.

``serve deploy ray.yaml``. Ray starts, places and watches; what runs in a server's deployment is its exact command, under a
``http_keeper``, so that it ends with its replica. Only the router's replica loads torch, for whom it is imported there.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from ray import serve

from heliostat.errors import Refused
from heliostat.serve.http_keeper import Kept, spawn
from heliostat.serve.log import Log
from heliostat.serve.trouble import Trouble

if TYPE_CHECKING:
    from fastapi import FastAPI

    from heliostat.serve.service import Service

PATIENCE = 120
"""Seconds until Ray holds a replica for dead that does not answer: it loads libraries first."""
REPLICAS = "/dev/stderr"
"""What a server logs goes to its replica's log, which Ray keeps."""
TRIFLE = 0.001
"""Of a node's own resource: enough to be placed there."""


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """One server, as ``render.ray`` writes it."""

    name: str
    words: Sequence[str]
    environment: Mapping[str, str]
    port: int
    gpus: float
    address: str


class Arguments(msgspec.Struct, forbid_unknown_fields=True):
    """What the configuration says."""

    family: str
    cluster: str
    """Text of the cluster file."""
    keys: str
    """File of API keys, on the node of the router."""
    hosts: Sequence[str] = ()
    """Names under which it may be asked."""
    servers: Sequence[Asked] = ()


class Server:
    """A replica that holds one vLLM server."""

    def __init__(self, name: str, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self._name = name
        self._keeper = spawn(Kept(words, environment, REPLICAS))

    def check_health(self) -> None:
        """Ray starts a replica again whose check raises."""
        if (status := self._keeper.poll()) is not None:
            raise RuntimeError(f"vLLM server {self._name} ended with status {status}")

    def __del__(self) -> None:
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()  # by which the keeper ends it


class Inside:
    """ASGI: what comes to a replica of the router goes to the server that it has made."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Knows nothing itself: Ray copies it into each replica before there is a server."""
        if scope["type"] == "http":
            replica: Any = serve.get_replica_context().servable_object
            await (await replica.app() or _not_yet())(scope, receive, send)


def _not_yet() -> Any:
    """ASGI: the reason is for whoever runs it, and not for everybody who asks."""
    from fastapi.responses import JSONResponse

    trouble = Trouble(503, "this service cannot start: the log of its router says why", code="not_started")
    return JSONResponse(trouble.body, trouble.status)


class Router:
    """A replica that holds our server, which starts when Ray first asks how it is, or somebody for an answer."""

    def __init__(self, arguments: Mapping[str, Any], *servers: Any) -> None:
        """``servers``: the deployments that Ray starts together with this one."""
        self._servers = servers
        self._arguments = msgspec.convert(arguments, type=Arguments)
        self._folder = tempfile.TemporaryDirectory(prefix="heliostat-")
        self._starting = asyncio.Lock()
        self._service: Service | None = None
        self._app: FastAPI | None = None

    async def app(self) -> FastAPI | None:
        """Ours, when all servers are what the cluster file says; None where one is not: who asks next tries again."""
        async with self._starting:
            if self._app is None:
                try:
                    # Not on the loop, which says meanwhile that it lives.
                    service, app = await asyncio.to_thread(self._made)
                    await service.start()
                except Refused as refused:
                    Log().say("router cannot start", why=str(refused))
                    return None
                self._service, self._app = service, app
            return self._app

    def _made(self) -> tuple[Service, FastAPI]:
        from heliostat.serve.app import build
        from heliostat.serve.run import Settings, service_of

        path = Path(self._folder.name) / "cluster.yaml"
        path.write_text(self._arguments.cluster, encoding="utf-8")
        settings = Settings(
            family=Path(self._arguments.family),
            cluster=path,
            keys=Path(self._arguments.keys),
            allow_hosts=tuple(self._arguments.hosts),
        )
        service = service_of(settings)
        return service, build(service, version=version("heliostat"))

    async def check_health(self) -> None:
        """Ray starts a replica again whose check raises."""
        if self._app is None and not self._starting.locked():
            self._begun = asyncio.create_task(self.app())  # kept, or it might be collected
        if self._service is not None and self._service.failure:
            raise RuntimeError(self._service.failure)


def application(args: Mapping[str, Any]) -> serve.Application:
    """What ``import_path`` names."""
    arguments = msgspec.convert(dict(args), type=Arguments)
    servers = [
        serve.deployment(
            Server,
            name=server.name,
            ray_actor_options={
                "num_cpus": 0,
                "num_gpus": server.gpus,
                "resources": {f"node:{server.address}": TRIFLE},
            },
        ).bind(server.name, list(server.words), dict(server.environment))
        for server in arguments.servers
    ]
    router = serve.deployment(
        serve.ingress(Inside())(Router),
        name="router",
        max_ongoing_requests=1024,
        health_check_timeout_s=PATIENCE,
        ray_actor_options={"num_cpus": 0},
    )
    return router.bind(dict(args), *servers)
