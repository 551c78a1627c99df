"""``heliostat serve --engine vllm`` with real vLLM servers: what it answers is what the embedded engine answers, token by
token in float32, also while its servers are killed; it runs in vLLM's own environment (``make vllm-env``)."""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from heliostat.build import read_family
from heliostat.engine.request import Sampling
from heliostat.errors import Refused
from heliostat.llm import LLM
from heliostat.serve.http_facts import Expected
from heliostat.serve.http_line import HttpLine
from heliostat.serve.http_worker import HttpWorker
from heliostat.vllm.launch import Launch, command
from heliostat.vllm.layout import prepared
from tests.promises.toys import CLOSE
from tests.slow.process import told
from tests.slow.vllm_family import MEMBERS, family, inside, python

pytestmark = pytest.mark.slow

PLAYED = ("sun-f", "pre-a", "ica-a", "solo-a")
"""One server writes for the first, one with the base for the second, one decode server speaks for both, and one of two
streams for the third; the fourth is an adapter that writes for itself on the base's servers."""
STARTING = 900
RETRIES = "heliostat_retries_total"
ROOM = (
    "--cache-mib",
    "64",
    "--max-length",
    "256",
    "--max-running",
    "16",
    "--deadline",
    "900",
    "--patience",
    "600",
)


@dataclass
class Served:
    """A server over vLLM servers, and the embedded engine to compare with."""

    folder: Path
    address: str
    log: Any
    llm: LLM

    def started(self) -> dict[str, dict[str, Any]]:
        """The latest start of each worker."""
        return {line["worker"]: line for line in self.log.events("worker starts")}

    def ready(self) -> int:
        return len(self.log.events("worker ready"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family of what is played."""
    python()
    return family(tmp_path_factory.mktemp("vllm"), members={name: MEMBERS[name] for name in PLAYED})


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    """The command of the README."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = inside(folder.parent)
    try:
        options = ("--engine", "vllm", "--prefill-workers", "2", "--decode-workers", "2", *ROOM)
        with told(folder, *options, starting=STARTING) as (address, _, log):
            yield Served(folder, address, log, LLM(folder, dtype="float32", max_length=256))
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


async def ask(http: httpx2.AsyncClient, member: str, prompt: Sequence[int], count: int) -> list[int]:
    body = {
        "model": member,
        "prompt": list(prompt),
        "max_tokens": count,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    reply = await http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    found: list[int] = reply.json()["choices"][0]["token_ids"]
    return found


def client(served: Served) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=served.address, timeout=900)


def same(
    served: Served, jobs: Sequence[tuple[str, Sequence[int], int]], found: Sequence[Sequence[int]]
) -> int:
    """Fail unless every answer is the embedded engine's, up to a tie; how many tokens were compared."""
    compared = 0
    for (member, prompt, count), ids in zip(jobs, found, strict=True):
        wish = Sampling(max_tokens=count, ignore_eos=True, logprobs=2)
        requests = [served.llm._request(list(prompt), member, wish, None, None)]
        gaps, wanted = [], []
        for piece in served.llm._run(requests):
            assert piece.sampled is not None
            best = sorted((chance for _, chance in piece.sampled.top), reverse=True)
            gaps.append(best[0] - best[1])
            wanted.append(piece.sampled.token)
        assert len(ids) == count
        for place, (ours, theirs, gap) in enumerate(zip(ids, wanted, gaps, strict=True)):
            if ours != theirs:
                assert gap < CLOSE, (
                    f"{member}, {len(prompt)} tokens, token {place}: {ours}, not {theirs} by {gap:.2e}"
                )
                break
            compared += 1
    return compared


def jobs_of(count: int, *, seed: int, tokens: int = 12) -> list[tuple[str, list[int], int]]:
    """Prompts of lengths around borders of pages, of all members in turns."""
    dice = random.Random(seed)
    lengths = [1, 2, 31, 32, 33, 63, 64, 65, 96, 129]
    members = [*PLAYED, "base"]
    return [
        (
            members[n % len(members)],
            [dice.randrange(3, 2000) for _ in range(lengths[n % len(lengths)])],
            1 + n % tokens,
        )
        for n in range(count)
    ]


async def answers(served: Served, jobs: Sequence[tuple[str, Sequence[int], int]]) -> list[list[int]]:
    async with client(served) as http:
        return list(await asyncio.gather(*(ask(http, *job) for job in jobs)))


def test_a_crowd_of_all_members_is_answered_as_by_one_engine(served: Served) -> None:
    jobs = jobs_of(40, seed=1)
    compared = same(served, jobs, asyncio.run(answers(served, jobs)))
    assert compared > sum(count for _, _, count in jobs) // 2
    print(f"token-exact: {compared} tokens of {len(jobs)} requests")


def test_a_conversation_goes_on_from_its_own_answers(served: Served) -> None:
    async def story() -> None:
        async with client(served) as http:
            for member in PLAYED:
                prompt = [5 + place for place in range(40)]
                for _ in range(3):
                    said = await ask(http, member, prompt, 9)
                    assert same(served, [(member, prompt, 9)], [said])
                    prompt = [*prompt, *said, 7, 8, 9]

    asyncio.run(story())


def counted(metrics: str, name: str) -> float:
    """The sum of a metric over its labels."""
    found = [line for line in metrics.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def test_a_client_that_leaves_is_noticed_by_the_servers(served: Served) -> None:
    """They stop long before the answer would have ended by itself."""
    most = 200
    body = {
        "model": "sun-f",
        "prompt": list(range(5, 45)),
        "max_tokens": most,
        "ignore_eos": True,
        "stream": True,
    }
    started = [start for name, start in served.started().items() if name.startswith("decode")]
    key = {"Authorization": f"Bearer {key_of(started[0]['process'])}"}

    async def story() -> None:
        async with client(served) as http:

            async def told_of(name: str) -> float:
                replies = [
                    await http.get(f"http://127.0.0.1:{start['port']}/metrics", headers=key)
                    for start in started
                ]
                return sum(counted(reply.text, f"vllm:{name}") for reply in replies)

            before = await told_of("generation_tokens_total")
            async with http.stream("POST", "/v1/completions", json=body) as reply:
                heard = 0  # the first text is of the server that read the prompt
                async for line in reply.aiter_lines():
                    heard += line.startswith("data:")
                    if heard == 5:
                        break
            for _ in range(200):
                if not await told_of("num_requests_running"):
                    assert 0 < await told_of("generation_tokens_total") - before < most - 1
                    return
                await asyncio.sleep(0.05)
            raise AssertionError("the decode server runs what nobody hears")

    asyncio.run(story())


def inner(keeper: int) -> list[int]:
    """Processes below a keeper."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == keeper:
            found += [int(path.parent.name), *inner(int(path.parent.name))]
    return found


def key_of(keeper: int) -> str:
    """The key that a server was started with."""
    for process in inner(keeper):
        entries = Path(f"/proc/{process}/environ").read_text().split("\0")
        found = dict(entry.partition("=")[::2] for entry in entries)
        if "VLLM_API_KEY" in found:
            return found["VLLM_API_KEY"]
    raise AssertionError("no process of it has a key")


def signalled(keeper: int, number: signal.Signals) -> None:
    for process in inner(keeper):
        with suppress(ProcessLookupError):
            os.kill(process, number)


@pytest.mark.parametrize("name", ["prefill-0", "decode-0"])
def test_a_killed_server_costs_time_and_no_token(served: Served, name: str) -> None:
    """One that reads prompts is stopped first, so that it has some when it dies; one that decodes dies while it speaks."""
    jobs = jobs_of(12, seed=2, tokens=40)
    ready, keeper = served.ready(), served.started()[name]["process"]

    async def story() -> list[list[int]]:
        async with client(served) as http:
            before = counted((await http.get("/metrics")).text, RETRIES)
            if name.startswith("prefill"):
                signalled(keeper, signal.SIGSTOP)
            asked = [asyncio.create_task(ask(http, *job)) for job in jobs]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            assert not all(one.done() for one in asked), "nothing is open any more"
            signalled(keeper, signal.SIGKILL)
            found = list(await asyncio.gather(*asked))
            assert counted((await http.get("/metrics")).text, RETRIES) > before, "it had nothing to do"
            return found

    assert same(served, jobs, asyncio.run(story()))
    until = time.monotonic() + STARTING
    while served.ready() == ready and time.monotonic() < until:
        time.sleep(0.2)
    assert served.ready() == ready + 1, "it was not started again"


def test_a_server_that_would_load_other_weights_does_not_start(folder: Path, tmp_path: Path) -> None:
    """As on a node whose copy of the exports has a file of another module, of the same shapes."""
    found = prepared(folder, read_family(folder), ["base", "sun-f.own"], tmp_path)
    right, other = (next(Path(found[name].folder).glob("*.safetensors")) for name in ("base", "sun-f.own"))
    right.unlink()
    shutil.copy(other, right)
    made = command(Launch(name="w", weights=found["base"], dtype="float32", port=1), python=python())
    environment = {**os.environ, **made.environment, "PYTHONPATH": inside(tmp_path)}
    done = subprocess.run(
        made.words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=STARTING,
        check=False,
    )
    assert done.returncode and b"is not what was exported" in done.stdout


def test_a_server_with_other_weights_is_refused_with_both_digests(served: Served) -> None:
    async def story() -> None:
        port = served.started()["decode-0"]["port"]
        expected = Expected(worker="decode-0", modules={f"base#{'f' * 12}": "f" * 64}, roles=("decode",))
        url, key = f"http://127.0.0.1:{port}", key_of(served.started()["decode-0"]["process"])
        stranger = HttpWorker(HttpLine(url), expected, served.llm.tokenizer)
        with pytest.raises(Refused, match="wants a key"):
            await stranger.describe()
        await stranger.close()
        worker = HttpWorker(HttpLine(url, key=key), expected, served.llm.tokenizer)
        with pytest.raises(Refused, match="digest") as refused:
            await worker.describe()
        assert "ffffffffffff" in str(refused.value)
        await worker.close()

    asyncio.run(story())


def test_nothing_of_it_outlives_it(served: Served) -> None:
    """Last: the server ends, and so do its servers."""
    processes = [
        process
        for line in served.started().values()
        for process in (line["process"], *inner(line["process"]))
    ]
    assert len(processes) > 3
    served.log._process.send_signal(signal.SIGTERM)
    served.log._process.wait(60)
    for _ in range(200):
        if not any(Path(f"/proc/{process}").exists() for process in processes):
            return
        time.sleep(0.05)
    raise AssertionError("a vLLM process is left")
