"""Too many connections, heads that are too large, and heads that never end, over real sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import uvicorn

from heliostat.serve import connections
from heliostat.serve.connections import Connection, capped
from heliostat.serve.run import listen
from tests.unit.serve.conftest import Serving, run, until

ASK = "GET {} HTTP/1.1\r\nHost: localhost\r\n{}\r\n"


class Listening:
    """A port, and what connects to it."""

    def __init__(self, port: int, server: uvicorn.Server) -> None:
        self.port, self.server = port, server
        self._writers: list[asyncio.StreamWriter] = []

    async def opened(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that the server knows of."""
        before = len(self.server.server_state.connections)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        await until(lambda: len(self.server.server_state.connections) > before or reader.at_eof())
        self._writers.append(writer)
        return reader, writer

    async def asked(self, path: str, headers: str = "") -> bytes:
        """All that comes back over a connection of its own, which is closed then."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(ASK.format(path, f"Connection: close\r\n{headers}").encode())
        found = await reader.read()
        writer.close()
        return found

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


Start = Callable[[type[Connection]], AbstractAsyncContextManager[Listening]]


@pytest.fixture
def listening(serving: Serving) -> Start:
    """A real listener around the tiny family's server."""

    @asynccontextmanager
    async def start(kind: type[Connection]) -> AsyncIterator[Listening]:
        async with serving() as served:
            config = uvicorn.Config(served.app, http=kind, ws="none", log_config=None, lifespan="off")
            server = uvicorn.Server(config)
            with listen("127.0.0.1", 0) as socket:
                task = asyncio.create_task(server._serve([socket]))
                await until(lambda: server.started)
                found = Listening(socket.getsockname()[1], server)
                yield found
                found.close()
                server.should_exit = True
                await task

    return start


def test_beyond_the_most_only_probes_are_answered(listening: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "SPARE", 2)

    async def work() -> None:
        async with listening(capped(3)) as found:
            held = [await found.opened() for _ in range(3)]
            full = await found.asked("/v1/models")
            assert full.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in full.lower()
            assert b"connection: close" in full.lower() and b"too_many_connections" in full
            assert (await found.asked("/health")).startswith(b"HTTP/1.1 200")
            more = [await found.opened() for _ in range(2)]
            turned_away, writer = await asyncio.open_connection("127.0.0.1", found.port)
            assert await turned_away.read() == b""
            writer.close()
            held[0][1].write(ASK.format("/v1/models", "").encode())
            assert (await held[0][0].readline()).startswith(b"HTTP/1.1 200"), "who was there is served"
            for _, writer in [*held, *more]:
                writer.close()
            await until(lambda: not found.server.server_state.connections)
            assert (await found.asked("/v1/models")).startswith(b"HTTP/1.1 200")

    run(work())


@pytest.mark.parametrize(
    "headers",
    [
        "X-Long: " + "a" * 100_000 + "\r\n",
        "".join(f"X-{number}: a\r\n" for number in range(10_000)),
    ],
)
def test_a_head_that_is_too_large_is_refused(listening: Start, headers: str) -> None:
    async def work() -> None:
        async with listening(capped(8)) as found:
            reader, writer = await found.opened()
            # Without its end: what is not read does not count.
            writer.write(ASK.format("/health", headers).encode()[: 64 * 1024 + 4096])
            assert (await reader.read()).startswith(b"HTTP/1.1 400")
            assert (await found.asked("/health")).startswith(b"HTTP/1.1 200")

    run(work())


def test_who_never_ends_a_head_is_let_go(listening: Start) -> None:
    async def work() -> None:
        async with listening(capped(8, patience=0.05)) as found:
            reader, writer = await found.opened()
            writer.write(b"GET /health HTTP/1.1\r\nHost:")
            assert await reader.read() == b""
            reader, writer = await found.opened()
            writer.write(ASK.format("/health", "").encode() + b"GET /hea")
            assert (await reader.read()).count(b"HTTP/1.1") == 1, "the second is not waited for"
            assert not found.server.server_state.connections

    run(work())


def test_a_server_is_started_with_them(tmp_path: Path) -> None:
    from fastapi import FastAPI

    from heliostat.serve.run import Settings, _config

    config = _config(Settings(family=tmp_path, max_connections=7), FastAPI())
    assert isinstance(config.http, type) and issubclass(config.http, Connection) and config.http.most == 7
