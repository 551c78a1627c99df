"""Real processes and kill -9: whoever dies, at whatever moment, no answer is wrong, nobody hangs and nothing is left."""

import asyncio
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest

from heliostat.llm import LLM
from tests.slow.process import Reading, told

pytestmark = pytest.mark.slow

MEMBERS = ("base", "solo", "math", "code", "plan")
WORDS = ["one", "two", "three", "add", "hello", "and", "5", "the"]
AT_ONCE, SECONDS = 24, 25.0
KILLS = ("prefill-0", "decode-0", "decode-1", "prefill-1", "decode-0", "prefill-0", "prefill-1", "decode-1")
DEADLINE = 60.0


def asked(number: int) -> dict[str, Any]:
    """One of forty requests: long enough to be in every phase when somebody dies."""
    dice = random.Random(number % 40)
    stem = " ".join(random.Random(number % 4).choices(WORDS, k=20))
    return {
        "model": MEMBERS[number % 5],
        "prompt": f"{stem} {' '.join(dice.choices(WORDS, k=dice.randint(1, 10)))}",
        "max_tokens": dice.randint(20, 120),
        "temperature": dice.choice([0.0, 0.9]),
        "seed": number % 40,
        "ignore_eos": True,
    }


async def streamed(client: httpx2.AsyncClient, body: dict[str, Any]) -> tuple[str, str]:
    """(text, what went wrong) of one answer."""
    text, error = "", ""
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        if reply.status_code != 200:
            return "", f"{reply.status_code}"
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    error = str(event["error"]["code"])
                elif event["choices"]:
                    text += event["choices"][0]["text"]
    return text, error


class Watch:
    """The server's processes, by the log."""

    def __init__(self, log: Reading) -> None:
        self._log = log

    def process_of(self, worker: str) -> int:
        """Of its latest life."""
        found = [e["process"] for e in self._log.events("worker ready") if e["worker"] == worker]
        return int(found[-1]) if found else 0

    def ready(self) -> Counter[str]:
        """How often each came to be ready."""
        return Counter(event["worker"] for event in self._log.events("worker ready"))

    async def back(self, worker: str, lives: int) -> None:
        """Until it has had so many lives."""
        async with asyncio.timeout(60):
            while self.ready()[worker] < lives:
                await asyncio.sleep(0.05)


def test_kill_nine_in_every_phase(tiny_family_made: Path) -> None:
    llm = LLM(tiny_family_made, dtype="float32", cache_mib=16)
    wanted = {}
    for number in range(40):
        body = asked(number)
        fields = {name: body[name] for name in ("max_tokens", "temperature", "seed", "ignore_eos")}
        ids = llm.tokenizer.plain_prompt_ids(body["prompt"])
        wanted[number] = llm.generate([ids], member=body["model"], **fields)[0].text
    options = ("--prefill-workers", "2", "--decode-workers", "2", "--cache-mib", "16")
    with told(tiny_family_made, *options, "--deadline", str(DEADLINE)) as (address, process, log):
        outcome, slowest = asyncio.run(_storm(address, Watch(log), wanted))
        stores = sorted(path.name for path in Path("/dev/shm").glob(f"heliostat-{process.pid}-*"))
        assert len(stores) == 4, "memory of the dead is swept"
    print(outcome, f"slowest {slowest:.1f} s")
    assert outcome["wrong"] == 0 and slowest < DEADLINE + 1
    assert outcome["right"] > 0.9 * outcome.total()
    assert not list(Path("/dev/shm").glob(f"heliostat-{process.pid}-*")), "and all of it at the end"


async def _storm(address: str, watch: Watch, wanted: dict[int, str]) -> tuple[Counter[str], float]:
    outcome: Counter[str] = Counter()
    slowest, until = 0.0, time.monotonic() + SECONDS
    limits = httpx2.Limits(max_connections=AT_ONCE)
    async with httpx2.AsyncClient(base_url=address, timeout=DEADLINE + 10, limits=limits) as client:

        async def ask(first: int) -> None:
            nonlocal slowest
            number = first
            while time.monotonic() < until:
                began = time.monotonic()
                text, error = await streamed(client, asked(number))
                slowest = max(slowest, time.monotonic() - began)
                if error:
                    outcome[error] += 1
                else:
                    outcome["right" if text == wanted[number % 40] else "wrong"] += 1
                number += AT_ONCE

        async def kill() -> None:
            lives = watch.ready()
            for worker in KILLS:
                await asyncio.sleep(random.Random(worker).uniform(0.2, 1.0))
                os.kill(watch.process_of(worker), signal.SIGKILL)
                lives[worker] += 1
                await watch.back(worker, lives[worker])

        await asyncio.gather(kill(), *(ask(first) for first in range(AT_ONCE)))
        for number in range(5):  # capacity is back
            assert await streamed(client, asked(number)) == (wanted[number], "")
    return outcome, slowest


def test_workers_end_with_a_server_that_is_killed(tiny_family_made: Path) -> None:
    options = ("--prefill-workers", "1", "--decode-workers", "1", "--cache-mib", "16")
    with told(tiny_family_made, *options) as (_, process, log):
        watch = Watch(log)
        workers = [watch.process_of(name) for name in ("prefill-0", "decode-0")]
        assert all(Path(f"/proc/{pid}").exists() for pid in workers)
        process.kill()
        process.wait()
    until = time.monotonic() + 20
    while any(_alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in workers)
    assert not list(Path("/dev/shm").glob(f"heliostat-{process.pid}-*"))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_worker_with_settings_that_cannot_be_met_says_why(tiny_family_made: Path, tmp_path: Path) -> None:
    from heliostat.serve.protocol import WorkerSettings
    from heliostat.serve.worker_process import REFUSED, spawn

    settings = WorkerSettings(
        family=str(tiny_family_made),
        worker="w",
        incarnation="i",
        modules={"base": "another digest"},
        endpoint=str(tmp_path / "w"),
    )
    process = spawn(settings)
    try:
        assert process.wait(60) == REFUSED
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    finally:
        assert process.stdin is not None
        process.stdin.close()


def test_a_signal_to_the_whole_group_does_not_end_a_worker(tiny_family_made: Path, tmp_path: Path) -> None:
    from heliostat.build import read_family
    from heliostat.serve.protocol import WorkerSettings
    from heliostat.serve.worker_process import spawn

    endpoint = tmp_path / "w"
    settings = WorkerSettings(
        family=str(tiny_family_made),
        worker="w",
        incarnation="i",
        modules={"base": read_family(tiny_family_made).modules["base"].digest},
        endpoint=str(endpoint),
    )
    process = spawn(settings)
    try:
        until = time.monotonic() + 60
        while not endpoint.exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert endpoint.exists()
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == 0, "its input says when"
    finally:
        process.kill()
