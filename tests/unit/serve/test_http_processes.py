"""vLLM servers that cannot be started, do not fit, or are told how; none of them is real here (tests/slow has those)."""

import asyncio
import io
import json
import os
import tempfile
from pathlib import Path

import pytest

from heliostat.build import load_tokenizer, read_family
from heliostat.errors import Refused
from heliostat.files import OWNER, hold
from heliostat.serve import http_processes
from heliostat.serve.cluster import Place, Terms, laid_out
from heliostat.serve.dispatch import Dispatcher
from heliostat.serve.http_launching import cores_of
from heliostat.serve.http_layout import with_modules
from heliostat.serve.http_processes import PYTHON, refuse_missing_vllm, servers
from heliostat.serve.log import Log
from heliostat.serve.metrics import Metrics
from heliostat.serve.processes import Means
from heliostat.serve.supervisor import Supervisor

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
