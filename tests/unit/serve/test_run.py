"""How a server starts, what it refuses, and how it ends."""

import asyncio
import io
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from heliostat.engine.speculation.wanted import Wanted
from heliostat.errors import Refused
from heliostat.serve.app import build
from heliostat.serve.log import Log
from heliostat.serve.run import STOPPED_TWICE, Listener, Settings, listen, service_of
from tests.unit.serve.conftest import Pace, engine_of, run, until


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_without_keys_only_this_machine_is_served(host: str, keys_file: Path) -> None:
    with pytest.raises(Refused, match="--keys FILE"):
        Settings(family=Path("fam"), host=host)
    Settings(family=Path("fam"), host=host, keys=keys_file)
    for loopback in ("127.0.0.1", "::1", "localhost"):
        Settings(family=Path("fam"), host=loopback)


def test_tls_wants_both_files(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="come together"):
        Settings(family=Path("fam"), tls_cert=tmp_path)
    with pytest.raises(Refused, match="is not there"):
        Settings(family=Path("fam"), tls_cert=tmp_path / "gone", tls_key=tmp_path / "gone")


def test_the_folder_is_named_as_workers_name_it(tiny_family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_family)
    service = service_of(Settings(family=Path(), prefill_workers=1, decode_workers=1))
    assert service.crew.folder == tiny_family.resolve(), (
        "or each dot of a message would be replaced by a name"
    )


def test_a_port_that_is_taken_is_told() -> None:
    with listen("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(Refused, match="choose another --port"):
            listen("127.0.0.1", first.getsockname()[1])


def test_a_member_that_there_is_not(tiny_family_made: Path) -> None:
    with pytest.raises(Refused, match="no member 'maths'.*did you mean 'math'"):
        service_of(Settings(family=tiny_family_made, members=["maths"], cache_mib=16))


def test_vllm_servers_draft_nothing(tiny_family_made: Path, tmp_path: Path) -> None:
    reached = tmp_path / "cluster.yaml"
    reached.write_text("workers: [{url: 'http://127.0.0.1:9'}]")
    for more in ({"engine": "vllm"}, {"cluster": reached}):
        with pytest.raises(Refused, match="--draft nonexistent.*without --engine vllm"):
            service_of(Settings(family=tiny_family_made, wanted=Wanted(draft="nonexistent"), **more))


class Drained:
    """A real listener in this process, whose signals are calls."""

    def __init__(self, family: Path, **options: Any) -> None:
        drain = options.pop("drain", 30.0)
        self.service = service_of(
            Settings(family=family, dtype="float32", cache_mib=16, **options), log=Log(None)
        )
        self.pace = Pace(engine_of(self.service), steps=2)
        config = uvicorn.Config(
            build(self.service, version="test"), http="h11", log_config=None, timeout_graceful_shutdown=1
        )
        self.socket = listen("127.0.0.1", 0)
        self.base = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.listener = Listener(config, self.service, drain=drain, address=self.base)

    async def started(self) -> asyncio.Task[None]:
        task = asyncio.create_task(self.listener._serve([self.socket]))
        await until(lambda: self.listener.started)
        return task

    async def hangs_up(self, sent: bytes, *, after: Callable[[], bool] = lambda: True) -> None:
        """A client that sends this over a real socket, and closes it."""
        host, port = self.socket.getsockname()
        _, writer = await asyncio.open_connection(host, port)
        writer.write(sent)
        await writer.drain()
        await until(after)
        writer.close()


BODY = {"model": "base", "prompt": "add 1", "max_tokens": 6, "ignore_eos": True, "stream": True}


def test_drain_finishes_what_is_in_flight(tiny_family_made: Path) -> None:
    async def work() -> None:
        before = set(threading.enumerate())
        one = Drained(tiny_family_made)
        serving = await one.started()
        async with httpx2.AsyncClient(base_url=one.base) as client:
            flying = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await until(lambda: one.service.in_flight == 1)
            one.listener.handle_exit(signal.SIGTERM, None)
            assert (await client.get("/health")).status_code == 503
            assert (await client.get("/ready")).status_code == 503
            assert (await client.get("/live")).json() == {"status": "draining"}
            refused = await client.post("/v1/completions", json=BODY)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
            one.pace.left = 10**6
            reply = await flying
            assert reply.text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in reply.text
            await serving
        assert all(thread.name != "engine" for thread in set(threading.enumerate()) - before)

    run(work())


@pytest.mark.parametrize("stream", [True, False])
def test_a_socket_that_closes_ends_its_request(tiny_family_made: Path, stream: bool) -> None:
    body = json.dumps({**BODY, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def work() -> None:
        one = Drained(tiny_family_made)
        serving = await one.started()
        await one.hangs_up(head + body, after=lambda: one.service.in_flight == 1 and not one.pace.left)
        await until(lambda: one.service.in_flight == 0 and not engine_of(one.service).unfinished)
        log = one.service.log.out = io.StringIO()
        await one.hangs_up(head + body[:5])
        await until(lambda: bool(log.getvalue()))
        assert json.loads(log.getvalue())["status"] == 499, "no fault of the server"
        one.listener.handle_exit(signal.SIGTERM, None)
        await serving

    run(work())


def test_drain_has_one_budget(tiny_family_made: Path) -> None:
    async def work() -> None:
        one = Drained(tiny_family_made, drain=0.1)
        serving = await one.started()
        async with httpx2.AsyncClient(base_url=one.base) as client:
            flying = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await until(lambda: one.service.in_flight == 1)
            one.listener.handle_exit(signal.SIGTERM, None)
            await serving
            with pytest.raises(httpx2.HTTPError):
                (await flying).raise_for_status()
        assert one.service.in_flight == 0 and not engine_of(one.service).unfinished

    run(work())


def test_a_second_signal_ends_at_once(tiny_family_made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)

    async def work() -> None:
        one = Drained(tiny_family_made)
        serving = await one.started()
        one.service.roster.begin(one.service.roster.find("base"))
        one.listener.handle_exit(signal.SIGTERM, None)
        assert statuses == []
        one.listener.handle_exit(signal.SIGINT, None)
        assert statuses == [STOPPED_TWICE]
        one.service.roster.end(one.service.roster.find("base"))
        await serving

    run(work())
