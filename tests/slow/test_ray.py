"""The Ray application on one node: Ray keeps a process for each server, and its HTTP proxy leads to our router.

``HELIOSTAT_RAY`` names a Python with Ray and heliostat (``make ray-env``). With ``HELIOSTAT_VLLM`` besides, the servers are
real ones, started by Ray; else those that answer are doubles of this process (tests/promises/doubles.py), and what Ray keeps
for them are processes that wait.
"""

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import yaml

from heliostat.build import load_modules, load_tokenizer, read_family
from heliostat.family import BASE
from heliostat.llm import LLM
from heliostat.serve.cluster import Terms
from heliostat.serve.nodes import Node, Nodes
from heliostat.serve.render import Means
from heliostat.serve.rendering import texts
from heliostat.serve.roster import module_name
from tests.promises.doubles import Double
from tests.slow import vllm_family

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
KEY = "secret-of-mine-0123456789"
STARTING = 600
"""Seconds until Ray, or a vLLM server, is up on a machine that is busy."""
PATIENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
}


def python() -> str:
    """Of an environment with Ray; skips the test where there is none."""
    found = os.environ.get("HELIOSTAT_RAY")
    if not found:
        pytest.skip("HELIOSTAT_RAY names no Python with Ray (make ray-env)")
    return found


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def content_of(folder: Path, terms: Terms, interpreter: str) -> Any:
    """What is rendered for one node without a GPU, read again."""
    node = Node(name="n", address="127.0.0.1", device="cpu", devices=2, memory=6144, port=free_port())
    means = Means(family=str(folder), python=interpreter)
    return yaml.safe_load(texts(folder, Nodes((node,), terms, "127.0.0.1"), "ray", means)["ray.yaml"])


@asynccontextmanager
async def deployed(
    content: Any, folder: Path, environment: Mapping[str, str]
) -> AsyncIterator[httpx2.AsyncClient]:
    """A client of the application while it runs."""
    (folder / "keys.yaml").write_text(f"{KEY}: {{name: me, members: all, admin: true}}\n")
    content["applications"][0]["args"]["keys"] = str(folder / "keys.yaml")
    (folder / "ray.yaml").write_text(yaml.safe_dump(content))
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        python(),
        str(ROOT / "tests" / "slow" / "ray_serving.py"),
        str(folder / "ray.yaml"),
        str(port),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **PATIENT, "VLLM_API_KEY": "", **environment},
    )
    try:
        assert process.stdin and process.stdout
        async with asyncio.timeout(STARTING):
            while b"UP" not in (line := await process.stdout.readline()):
                assert line, "Ray ended"
        url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {KEY}"}
        async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=STARTING) as http:
            yield http
        process.stdin.close()
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def asked(http: httpx2.AsyncClient, member: str) -> list[int]:
    """Token ids of an answer; that it streams the same, and asks for a key."""
    body = {
        "model": member,
        "prompt": list(range(5, 45)),
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    reply = await http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    found: list[int] = reply.json()["choices"][0]["token_ids"]
    async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        said = (await stream.aread()).split(
            b"\n"
        )  # texts of chance may hold what others take for ends of lines
    lines = [line.removeprefix(b"data:").strip() for line in said if line.startswith(b"data:")]
    assert lines.pop() == b"[DONE]"
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    assert [token for choice in choices for token in choice.get("token_ids") or ()] == found
    stranger = await http.post("/v1/completions", json=body, headers={"Authorization": ""})
    assert stranger.status_code == 401
    return found


def test_ray_serves_what_was_rendered(bare_family: Path, tmp_path: Path) -> None:
    python()
    tokenizer = load_tokenizer(bare_family, read_family(bare_family))
    loaded = load_modules(bare_family, read_family(bare_family), [BASE], dtype=torch.float32)[BASE]
    name = module_name(BASE, loaded.digest)
    content = content_of(
        bare_family, Terms(transfer="double", dtype="float32", page_size=32, max_length=128), "python3"
    )

    async def story() -> None:
        args = content["applications"][0]["args"]
        cluster = yaml.safe_load(args["cluster"])
        doubles = []
        for place, server in zip(cluster["workers"], args["servers"], strict=True):
            settings = json.loads(server["environment"]["HELIOSTAT_WORKER"])
            double = Double(place["name"], {name: loaded}, tokenizer, tuple(place["roles"]))
            double.facts = {"fit": settings["fit"], "page_size": 32}
            doubles.append(await double.start())
            place["url"] = double.url
            server["words"] = ["sleep", "1000"]
        args["cluster"] = yaml.safe_dump(cluster)
        inside = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        try:
            async with deployed(content, tmp_path, inside) as http:
                assert len(await asked(http, "base")) == 6
            assert any(double.begun for double in doubles)
        finally:
            for double in doubles:
                await double.stop()

    asyncio.run(story())


def test_vllm_servers_that_ray_started_chat_as_the_embedded_engine_does(tmp_path: Path) -> None:
    python()
    interpreter = str(Path(vllm_family.python()).absolute())
    folder = vllm_family.family(tmp_path, members={"pre-a": vllm_family.MEMBERS["pre-a"]})
    content = content_of(
        folder, Terms(transfer="files", dtype="float32", page_size=32, max_length=256), interpreter
    )
    llm = LLM(folder, dtype="float32", max_length=256)
    inside = {"PYTHONPATH": f"{vllm_family.inside(tmp_path)}:{ROOT}"}
    said = [{"role": "user", "content": "How many legs do three cats have?"}]
    chat = {"model": "pre-a", "messages": said, "max_tokens": 6, "temperature": 0, "ignore_eos": True}

    async def story() -> None:
        async with deployed(content, tmp_path, inside) as http:
            for member in ("pre-a", "base"):
                (answer,) = llm.generate([list(range(5, 45))], member=member, max_tokens=6, ignore_eos=True)
                assert await asked(http, member) == list(answer.ids)
            reply = await http.post("/v1/chat/completions", json={**chat, "return_token_ids": True})
            assert reply.status_code == 200, reply.text
            (answer,) = llm.generate([said], member="pre-a", max_tokens=6, ignore_eos=True)
            assert reply.json()["choices"][0]["token_ids"] == list(answer.ids)

    asyncio.run(story())
