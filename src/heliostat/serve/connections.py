"""Connections: how many may be open, and how long one may take to ask for something. uvicorn does the rest.

A head larger than 64 KiB, however many headers it has, is refused by h11 with 400 before anything of it is kept.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from heliostat.serve.answering import Json
from heliostat.serve.gate import OPEN_PATHS
from heliostat.serve.trouble import Trouble

SPARE = 64
"""Connections beyond the most that are still told so; more are closed without a word."""


class Connection(H11Protocol):
    """One connection. ``capped`` makes a kind of it that knows how many there may be."""

    most: ClassVar[int] = 512
    patience: ClassVar[float] = 30.0
    """Longest wait for the head of a request, in seconds; a body has its own."""
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """One more: served, told that there are too many, or closed."""
        super().connection_made(transport)
        if len(self.connections) > self.most + SPARE:
            transport.abort()
        elif len(self.connections) > self.most:
            self._served, self.app = self.app, self._full
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        if self._waiting is not None:
            self._waiting.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """The next request may come."""
        super().on_response_complete()
        self._wait()

    def _wait(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = self.loop.call_later(self.patience, self._give_up, self.cycle)

    def _give_up(self, last: Any) -> None:
        if self.cycle is last and (last is None or last.response_complete):
            self.transport.close()

    async def _full(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Probes are answered; others come again."""

        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        if scope["path"] in OPEN_PATHS:
            await self._served(scope, receive, closing)
            return
        told = f"{self.most} connections are open, which is the most; try again soon"
        trouble = Trouble(503, told, code="too_many_connections", headers={"Retry-After": "1"})
        await Json(trouble.body, trouble.status, headers=trouble.headers)(scope, receive, closing)


def capped(most: int, *, patience: float = Connection.patience) -> type[Connection]:
    """Connections of which ``most`` may be open."""
    return type("Capped", (Connection,), {"most": most, "patience": patience})
