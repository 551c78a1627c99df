"""vLLM servers that cannot be started, do not fit, or are told how; none of them is real here (tests/slow has those)."""

import asyncio
import io
import json
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest

from heliostat.build import load_tokenizer, read_family
from heliostat.errors import Refused
from heliostat.files import OWNER, hold
from heliostat.serve import http_processes
from heliostat.serve.cluster import ROLES, Cluster, Place, Terms, laid_out
from heliostat.serve.dispatch import Dispatcher
from heliostat.serve.http_launching import common_of, cores_of
from heliostat.serve.http_layout import servers_of, with_modules
from heliostat.serve.http_processes import PYTHON, Servers, refuse_missing_vllm, servers
from heliostat.serve.log import Log
from heliostat.serve.metrics import Metrics
from heliostat.serve.processes import Means
from heliostat.serve.roster import module_name
from heliostat.serve.supervisor import Supervisor
from heliostat.vllm import layout

MEMBER = "math"


def crew(folder: Path, log: io.StringIO, **more: object) -> Supervisor:
    family = read_family(folder)
    rows = {MEMBER: family.row(MEMBER)}
    terms = Terms(dtype="float32", max_length=64)
    cluster = with_modules(laid_out(prefill=1, decode=1, engine="vllm", terms=terms), family, rows)
    means = Means(**{"family": folder, "cache_mib": 1, **more})  # type: ignore[arg-type]
    tokenizer = load_tokenizer(folder, family)
    return servers(cluster, family, rows, Dispatcher(Metrics()), means, tokenizer=tokenizer, log=Log(log))


def pretend(folder: Path, script: str) -> str:
    """A program in the place of a Python with vLLM."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return str(path)


def test_without_vllm_the_way_to_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON, str(tmp_path / "none"))
    with pytest.raises(Refused, match="make vllm-env"):
        refuse_missing_vllm()


def test_a_server_that_dies_at_once_is_told_with_its_last_words(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PYTHON, pretend(tmp_path, "echo no such device; exit 3"))
    log = io.StringIO()
    found = crew(tiny_family, log)
    with pytest.raises(Refused, match="cannot be started: .*ended with status 3"):
        asyncio.run(found.start())
    told = [json.loads(line) for line in log.getvalue().splitlines()]
    assert any(line["event"] == "worker's last words" and "no such device" in line["words"] for line in told)


def test_every_server_gets_its_exact_words_and_a_key_that_nobody_else_has(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "said"
    out.mkdir()
    monkeypatch.setenv(
        PYTHON, pretend(tmp_path, f'env > "{out}/$$.env"; echo "$@" > "{out}/$$.words"; exit 1')
    )
    with pytest.raises(Refused):
        asyncio.run(crew(tiny_family, io.StringIO()).start())
    words = [path.read_text() for path in sorted(out.glob("*.words"))]
    assert words and all("--host 127.0.0.1" in line and "--dtype float32" in line for line in words)
    environments = [path.read_text().splitlines() for path in sorted(out.glob("*.env"))]
    keys = {line for lines in environments for line in lines if line.startswith("VLLM_API_KEY=")}
    assert len(keys) == 1 and len(keys.pop()) > 40


def test_servers_that_do_not_fit_together_are_refused_with_the_numbers(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PYTHON, pretend(tmp_path, "exit 1"))
    with pytest.raises(Refused, match=r"prefill-0: pages +\d+.0 MiB[\s\S]*cluster render"):
        crew(tiny_family, io.StringIO(), cache_mib=10**8)


def test_processors_are_dealt_out_so_that_not_all_sit_on_the_first() -> None:
    places = [Place(name="a"), Place(name="b", threads=2), Place(name="c")]
    assert cores_of(places, 4) == {"a": "0", "b": "1-2", "c": "3"}
    assert cores_of(places, 2) == {"a": "0", "b": "0-1", "c": "0"}


def test_what_a_killed_server_left_is_swept_by_the_next(
    tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of logs and of memory; those of one that lives stay, and its own go with it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(http_processes, "KEPT", str(tmp_path / "memory"))
    monkeypatch.setenv(PYTHON, pretend(tmp_path, "exit 1"))
    killed = [tmp_path / "heliostat-killed", tmp_path / f"memory-1-abcd-{os.getuid()}"]
    living = [tmp_path / "heliostat-lives", tmp_path / f"memory-2-abcd-{os.getuid()}"]
    for folder in (*killed, *living):
        folder.mkdir()
        (folder / "0.pages").touch()
        descriptor = hold(folder / OWNER)
        if folder in killed:
            os.close(descriptor)
    found = crew(tiny_family, io.StringIO())
    assert len(list(tmp_path.glob("memory-*"))) == len(list(tmp_path.glob("heliostat-*"))) == 3

    async def story() -> None:
        with pytest.raises(Refused):
            await found.start()
        await found.stop()  # once more

    asyncio.run(story())
    assert {*tmp_path.glob("memory-*"), *tmp_path.glob("heliostat-*")} == set(living)


def starter(folder: Path, *places: Place, **terms: Any) -> Servers:
    family = read_family(folder)
    rows = {MEMBER: family.row(MEMBER)}
    cluster = with_modules(
        Cluster(places, terms=Terms(dtype="float32", max_length=64, **terms)), family, rows
    )
    common = common_of(cluster, family, Means(family=folder), write=False)
    return Servers(
        common, servers_of(cluster, family, rows), load_tokenizer(folder, family), Log(io.StringIO())
    )


def test_a_port_stays_its_servers(tiny_family: Path) -> None:
    place, other = (Place(name=role, spawn="vllm", roles=(role,)) for role in ROLES)
    made = starter(tiny_family, place, other)
    port = made._port(place)
    with socket.socket() as thief, pytest.raises(OSError):
        thief.bind(("127.0.0.1", port))
    with socket.socket() as server:  # as vLLM makes it
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        socket.create_connection(("127.0.0.1", port)).close()
        assert made._port(place) != port, "the one before may not have let go of its port"
    made.leave()


async def describing(facts: dict[str, Any]) -> asyncio.Server:
    """A server that says this of itself, and nothing else."""
    body = json.dumps(facts).encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


@pytest.mark.parametrize("transfer", ["nixl", "files"])
def test_two_versions_between_machines_are_refused_while_both_are_there(
    tiny_family: Path, transfer: str
) -> None:
    family = read_family(tiny_family)
    facts = {
        "page_size": 32, "dtype": "float32", "max_length": 64, "max_running": 8, "transfer": transfer, "heliostat": "",
        "fit": layout.fit(tiny_family, family, dtype="float32", page_size=32), "incarnation": "life",
    }  # fmt: skip

    async def story() -> None:
        modules = {name: family.module(name).digest for name in ("base", f"{MEMBER}.own")}
        offered = {module_name(name, digest): digest for name, digest in modules.items()}
        facts.update(modules=offered, writers=offered)
        urls, listening = {}, []
        for name, role, version in (("p", "prefill", "0.32.0"), ("d", "decode", "0.31.1")):
            listening.append(await describing({**facts, "worker": name, "role": role, "vllm": version}))
            urls[name] = f"http://127.0.0.1:{listening[-1].sockets[0].getsockname()[1]}"
        places = {
            "p": Place(name="p", spawn=None, url=urls["p"], roles=("prefill",)),
            "d": Place(name="d", spawn=None, url=urls["d"], roles=("decode",)),
        }
        made = starter(tiny_family, *places.values(), transfer=transfer)
        first = await made(places["p"], {})
        if transfer == "files":
            await (await made(places["d"], {})).end()
        else:
            with pytest.raises(Refused, match=r"'d' runs vLLM 0.31.1, worker 'p' 0.32.0"):
                await made(places["d"], {})
        await first.end()
        await (await made(places["d"], {})).end()  # who has gone is nobody to differ from
        for one in listening:
            one.close()
        made.leave()

    asyncio.run(story())
