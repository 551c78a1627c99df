"""What every request passes first: its Host and Origin, its key, its id; and the one line that the log has of it.

A pure ASGI layer: whatever goes wrong inside becomes the dialect's error object, without path, address or traceback.
"""

from __future__ import annotations

import re
import secrets
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heliostat.errors import Refused
from heliostat.serve.answering import Gone, Json
from heliostat.serve.dialect import ChatAsking, TextAsking
from heliostat.serve.hosts import knows
from heliostat.serve.keys import Tenant
from heliostat.serve.service import Service
from heliostat.serve.trouble import Trouble, trouble_of

FIELDS = frozenset(ChatAsking.model_fields.keys() | TextAsking.model_fields.keys())
OPEN_PATHS = frozenset({"/health", "/live", "/ready"})
ADMIN = ("/admin/", "/metrics")
"""Beginnings of paths that need the key of an admin."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(slots=True)
class Gate:
    """The layer around the routes."""

    app: ASGIApp
    service: Service
    shell: frozenset[str] = frozenset({"/"})
    """Pages that show nothing but a question for a key to whoever has none."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        passing = _Passing(Headers(scope=scope), send)
        scope["state"] = {**scope.get("state", {}), "request_id": passing.id}
        try:
            scope["state"]["tenant"] = passing.tenant = self._tenant(scope, passing.headers)
            await self.app(scope, receive, passing.send)
        except Gone:
            passing.status = 499  # as other servers log it; nobody reads the answer
        except Exception as error:
            await passing.fail(self._trouble(error, passing), scope, receive, self.service)
        finally:
            self._log(scope, passing)

    def _tenant(self, scope: Scope, headers: Headers) -> Tenant | None:
        path = scope["path"]
        self._check_host(headers)
        if path in OPEN_PATHS:
            return None
        try:
            tenant = self.service.tenant(headers.get("authorization"))
        except Trouble:
            if path in self.shell and scope["method"] == "GET":
                return None
            raise
        if path.startswith(ADMIN) and not tenant.admin:
            raise Trouble(403, "this needs the key of an admin", code="not_admin")
        return tenant

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not knows(self.service.hosts, hosts[0]):
            raise Trouble(
                400, "this server is not known by that Host; allow it with --allow-host", code="host"
            )
        for origin in headers.getlist("origin"):
            # A page of somebody else that a browser has open must not reach a server without keys.
            if not knows(self.service.hosts, origin.partition("://")[2]):
                raise Trouble(403, "requests of pages of other origins are not taken", code="origin")

    def _trouble(self, error: Exception, passing: _Passing) -> Trouble:
        if isinstance(error, Trouble):
            return error
        if isinstance(error, Refused):
            return trouble_of(error, fields=FIELDS)
        trace = "".join(traceback.format_exception(error))
        self.service.log.say("fault", request_id=passing.id, trace=trace)
        return Trouble(500, f"a fault of the server ({type(error).__name__})", code="fault")

    def _log(self, scope: Scope, passing: _Passing) -> None:
        told: Callable[[], dict[str, Any]] = scope["state"].get("told", dict)
        known = scope.get("route") is not None or scope["path"] in OPEN_PATHS
        if scope["path"] in OPEN_PATHS and passing.status == 200:
            return  # a probe every second tells nothing
        self.service.log.say(
            "request",
            request_id=passing.id,
            method=scope["method"],
            path=scope["path"] if known else "(unknown)",
            status=passing.status,
            seconds=round(time.monotonic() - passing.began, 4),
            tenant=passing.tenant.name or None if passing.tenant else None,
            **told(),
        )


class _Passing:
    """One request on its way through."""

    def __init__(self, headers: Headers, send: Send) -> None:
        given = headers.get("x-request-id", "")
        self.headers = headers
        self.id = given if REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        self.status = 0
        self.tenant: Tenant | None = None
        self.began = time.monotonic()
        self._send = send

    async def send(self, message: Message) -> None:
        """Pass a message on, the request's id in its headers."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["X-Request-ID"] = self.id
        await self._send(message)

    async def fail(self, trouble: Trouble, scope: Scope, receive: Receive, service: Service) -> None:
        """Answer with an error, where nothing has been answered yet."""
        if trouble.status >= 429:
            service.dispatcher.metrics.refused.labels(str(trouble.status)).inc()
        if not self.status:
            response = Json(trouble.body, trouble.status, headers=trouble.headers)
            await response(scope, receive, self.send)
