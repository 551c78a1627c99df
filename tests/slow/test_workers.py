"""``heliostat serve`` with worker processes, as a user starts it: the same answers, also when processes are killed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from heliostat.llm import LLM
from tests.slow.process import Reading, told

pytestmark = pytest.mark.slow

MEMBERS = ["base", "solo", "math", "code", "plan"]
SHARED_MEMORY = Path("/dev/shm")
CACHE = ("--cache-mib", "16")
APART = (*CACHE, "--prefill-workers", "2", "--decode-workers", "1")
TEXTS = [f"{' '.join(['one two three'] * (n % 7))} add {n} and {n + 1}" for n in range(20)]
TOKENS = 40


@pytest.fixture(scope="module")
def wanted(tiny_family_made: Path) -> dict[tuple[str, str], str]:
    """(member, text) -> the answer that one process gives, greedily."""
    llm = LLM(tiny_family_made, dtype="float32", cache_mib=16)
    asked = [(member, text) for text in TEXTS for member in MEMBERS]
    prompts = [llm.tokenizer.plain_prompt_ids(text) for _, text in asked]
    answers = llm.generate(prompts, member=[m for m, _ in asked], max_tokens=TOKENS, ignore_eos=True)
    return dict(zip(asked, (answer.text for answer in answers), strict=True))


@contextmanager
def served(
    family: Path | None, *options: str
) -> Iterator[tuple[str, subprocess.Popen[str], dict[str, int], Reading]]:
    """(address, process, processes of its workers, log) of a server; no worker and no memory outlives it."""
    with told(family, *options) as (address, process, log):
        yield address, process, workers(log), log
    until(lambda: not any(map(alive, workers(log).values())), "a worker outlived its server")
    until(lambda: not list(SHARED_MEMORY.glob(f"heliostat-{process.pid}-*")), "memory stays in /dev/shm")


def until(condition: Callable[[], bool], what: str, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def workers(log: Reading) -> dict[str, int]:
    """Name -> process of each worker's latest life."""
    return {line["worker"]: line["process"] for line in log.events("worker ready")}


def body(member: str, text: str, **more: Any) -> dict[str, Any]:
    return {
        "model": member,
        "prompt": text,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


async def streamed(client: httpx2.AsyncClient, member: str, text: str) -> str:
    """An answer as its pieces came."""
    found = ""
    async with client.stream("POST", "/v1/completions", json=body(member, text, stream=True)) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                found += event["choices"][0]["text"]
    return found


async def whole(client: httpx2.AsyncClient, member: str, text: str) -> str:
    reply = await client.post("/v1/completions", json=body(member, text))
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def crowd(
    address: str, wanted: dict[tuple[str, str], str], *, ask: Callable[..., Awaitable[str]], rounds: int = 1
) -> list[tuple[str, str]]:
    """Everything at once; those that were answered otherwise than by one process."""

    async def work() -> list[tuple[str, str]]:
        limits = httpx2.Limits(max_connections=64)
        async with httpx2.AsyncClient(base_url=address, timeout=120, limits=limits) as client:
            asked = list(wanted) * rounds
            found = await asyncio.gather(*(ask(client, *one) for one in asked))
            return [one for one, text in zip(asked, found, strict=True) if text != wanted[one]]

    return asyncio.run(work())


def test_all_rows_at_once_are_what_one_process_says(
    tiny_family_made: Path, wanted: dict[tuple[str, str], str]
) -> None:
    with served(tiny_family_made, *APART) as (address, _, processes, _):
        assert set(processes) == {"prefill-0", "prefill-1", "decode-0"}
        for ask in (whole, streamed):
            assert crowd(address, wanted, ask=ask) == []
        text = httpx2.get(f"{address}/metrics").text
        assert 'heliostat_worker_up{roles="decode",worker="decode-0"} 1.0' in text
        moved = [line for line in text.splitlines() if line.startswith("heliostat_transfer_bytes_total{")]
        assert {line.split('"')[1] for line in moved} == set(MEMBERS), "every row was apart"
        assert "decode-0" in httpx2.get(address).text


def test_without_who_reads_prompts_a_request_ends_at_its_deadline(tiny_family_made: Path) -> None:
    options = (*CACHE, "--prefill-workers", "1", "--decode-workers", "1", "--deadline", "3")
    with served(tiny_family_made, *options) as (address, _, processes, _):
        process = processes["prefill-0"]
        os.kill(process, signal.SIGSTOP)  # alive, and says nothing
        began = time.monotonic()
        reply = httpx2.post(f"{address}/v1/completions", json=body("math", "add 2 and 3"), timeout=30)
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "deadline", reply.text
        assert time.monotonic() - began < 5
        os.kill(process, signal.SIGCONT)
        until(
            lambda: (
                httpx2.post(f"{address}/v1/completions", json=body("math", "add"), timeout=30).status_code
                == 200
            ),
            "it was never answered again",
        )


def test_workers_end_with_a_server_that_is_killed(tiny_family_made: Path) -> None:
    with served(tiny_family_made, *APART) as (_, process, _, _):
        process.kill()
        process.wait(30)


def test_two_servers_at_once_on_one_family(
    tiny_family_made: Path, wanted: dict[tuple[str, str], str]
) -> None:
    with served(tiny_family_made, *APART) as (one, _, _, _):
        with served(tiny_family_made, *APART) as (other, _, _, _):
            with ThreadPoolExecutor(2) as pool:
                asking = [pool.submit(crowd, address, wanted, ask=whole) for address in (one, other)]
                assert [found.result(timeout=120) for found in asking] == [[], []]
        assert crowd(one, wanted, ask=whole) == [], "the end of the other one took nothing away"


def test_a_cluster_that_is_written_down_is_the_same(
    tiny_family_made: Path, tmp_path: Path, wanted: dict[tuple[str, str], str]
) -> None:
    main = ["-c", "from heliostat.cli import main; main()", "serve", str(tiny_family_made), "--print-cluster"]
    made = subprocess.run([sys.executable, *main, *APART], capture_output=True, text=True, check=True)
    path = tmp_path / "cluster.yaml"
    path.write_text(made.stdout.replace("name: decode-0", "name: speaks\n  threads: 1\n  memory: 600"))
    with served(None, *CACHE, "--cluster", str(path)) as (address, _, processes, _):
        assert set(processes) == {"prefill-0", "prefill-1", "speaks"}
        assert crowd(address, wanted, ask=streamed) == []


def test_members_come_and_go_across_workers(
    tiny_family_made: Path, wanted: dict[tuple[str, str], str]
) -> None:
    few = {one: text for one, text in wanted.items() if one[0] in ("math", "plan")}
    options = (*APART, "--member", "math", "--member", "base")
    with served(tiny_family_made, *options) as (address, _, _, log):
        with httpx2.Client(base_url=address, timeout=60) as client:
            assert client.post("/v1/completions", json=body("plan", "add")).status_code == 404
            assert client.post("/admin/members/plan/load").status_code == 200
            assert crowd(address, few, ask=whole) == []
            os.kill(workers(log)["decode-0"], signal.SIGKILL)
            until(lambda: len(log.events("worker ready")) == 4, "it did not come back")
            assert crowd(address, few, ask=whole) == [], "what came later is there again, too"
            assert client.post("/admin/members/plan/unload").status_code == 200
            assert client.post("/v1/completions", json=body("plan", "add")).status_code == 404
            assert crowd(address, {o: t for o, t in few.items() if o[0] == "math"}, ask=whole) == []


def test_a_terminal_s_ctrl_c_drains(tiny_family_made: Path) -> None:
    with served(tiny_family_made, *APART) as (address, process, processes, log):
        assert httpx2.get(f"{address}/health").status_code == 200
        for each in (process.pid, *processes.values()):
            os.kill(each, signal.SIGINT)
        assert process.wait(30) == 0
        assert log.events("stopped")
