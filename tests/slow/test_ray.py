"""The Ray application on one node: Ray keeps a process for each server, and its HTTP proxy leads to our router.

The servers that answer are doubles of this process (tests/promises/doubles.py); what Ray keeps for them are processes that
wait. ``HELIOSTAT_RAY`` names a Python with Ray and heliostat (``pip install 'heliostat[ray]'``).
"""

import asyncio
import os
import socket
import subprocess
from pathlib import Path

import httpx2
import pytest
import torch
import yaml

from heliostat.build import load_modules, load_tokenizer, read_family
from heliostat.family import BASE
from heliostat.serve.cluster import Terms
from heliostat.serve.nodes import Node, Nodes
from heliostat.serve.render import Means
from heliostat.serve.rendering import texts
from heliostat.serve.roster import module_name
from tests.promises.doubles import Double

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def test_ray_serves_what_was_rendered(
    bare_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = os.environ.get("HELIOSTAT_RAY")
    if not python:
        pytest.skip("HELIOSTAT_RAY names no Python with Ray")
    monkeypatch.setenv("VLLM_API_KEY", "")
    family = read_family(bare_family)
    tokenizer = load_tokenizer(bare_family, family)
    loaded = load_modules(bare_family, family, [BASE], dtype=torch.float32)[BASE]
    name = module_name(BASE, loaded.digest)
    node = Node(name="n", address="127.0.0.1", device="cpu", devices=2, memory=16384)
    terms = Terms(transfer="double", dtype="float32", page_size=32, max_length=128)
    found = texts(
        bare_family,
        Nodes((node,), terms, "127.0.0.1"),
        "ray",
        Means(family=str(bare_family), python="python3"),
    )

    async def story() -> None:
        content = yaml.safe_load(found["ray.yaml"])
        args = content["applications"][0]["args"]
        cluster = yaml.safe_load(args["cluster"])
        doubles = []
        for place, server in zip(cluster["workers"], args["servers"], strict=True):
            settings = yaml.safe_load(server["environment"]["HELIOSTAT_WORKER"])
            double = Double(place["name"], {name: loaded}, tokenizer, tuple(place["roles"]))
            double.facts = {
                "fit": settings["fit"],
                "page_size": 32,
                "transfer": "files",
                "folder": str(tmp_path),
            }
            doubles.append(await double.start())
            place["url"] = double.url
            server["words"] = ["sleep", "1000"]
        args["cluster"] = yaml.safe_dump(cluster)
        args["keys"] = str(tmp_path / "keys.yaml")
        (tmp_path / "keys.yaml").write_text(
            "secret-of-mine-0123456789: {name: me, members: all, admin: true}\n"
        )
        (tmp_path / "ray.yaml").write_text(yaml.safe_dump(content))
        port = free_port()
        process = await asyncio.create_subprocess_exec(
            python,
            str(ROOT / "tests" / "slow" / "ray_serving.py"),
            str(tmp_path / "ray.yaml"),
            str(port),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "RAY_USAGE_STATS_ENABLED": "0"},
        )
        try:
            assert process.stdin and process.stdout
            async with asyncio.timeout(240):
                while b"UP" not in (line := await process.stdout.readline()):
                    assert line, "Ray ended"
            headers = {"Authorization": "Bearer secret-of-mine-0123456789"}
            body = {
                "model": "base",
                "prompt": list(range(5, 45)),
                "max_tokens": 6,
                "temperature": 0,
                "ignore_eos": True,
            }
            async with httpx2.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=240
            ) as http:
                reply = await http.post("/v1/completions", json={**body, "return_token_ids": True})
                assert reply.status_code == 200, reply.text
                assert len(reply.json()["choices"][0]["token_ids"]) == 6
                async with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
                    lines = [line async for line in stream.aiter_lines() if line.startswith("data:")]
                assert lines[-1] == "data: [DONE]" and len(lines) > 3
                assert (
                    await http.post("/v1/completions", json=body, headers={"Authorization": ""})
                ).status_code == 401
            assert any(double.begun for double in doubles)
            process.stdin.close()
            await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            for double in doubles:
                await double.stop()

    asyncio.run(story())
