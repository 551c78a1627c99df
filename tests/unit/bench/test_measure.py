"""A measurement as a whole, over sockets: its three files, what they say, and what Ctrl-C leaves of them."""

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from heliostat.bench.logs import read_log
from tests.unit.bench.conftest import HEAD, LAST, Say, chunk, event, refusal, serving, usage
from tests.unit.cli.conftest import Heliostat, heliostat

__all__ = ["heliostat"]  # the fixture

SHORT = ["--sessions", 4, "--turns", 1, "--context", 20, "--answer", 4, "--observation", 4, "--role", 4]
FAST = [*SHORT, "--pause", 0.001]


@contextmanager
def served(say: Say) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    address: list[str] = []
    begun, loop = threading.Event(), asyncio.new_event_loop()
    over = asyncio.Event()

    async def work() -> None:
        async with serving(say) as url:
            address.append(url)
            begun.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(work()))
    thread.start()
    begun.wait(10)
    yield address[0]
    loop.call_soon_threadsafe(over.set)
    thread.join(10)
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


async def well(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    told = [chunk(f"word{n} ") for n in range(body["max_tokens"])]
    count = usage(sum(len(m["content"].split()) for m in body["messages"]), body["max_tokens"], cached=4)
    writer.write(HEAD + b"".join(map(event, [*told, LAST, count, b"[DONE]"])))


def test_two_rates_and_their_files(heliostat: Heliostat, tmp_path: Path) -> None:
    with served(well) as url:
        words = ["--url", url, "--workflow", "reflexion", "--rate", "50,100", *FAST, "--keep-prompts"]
        said = heliostat("bench", "client", *words, "--out", tmp_path)
    assert "reflexion" in said.stdout and "report.html" in said.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["members"] == ["a"] and not results["stopped"]
    assert [run["rate"] for run in results["runs"]] == [50, 100]
    assert all(run["requests"]["answered"] == 12 for run in results["runs"])
    assert results["birth"]["commit"] and results["load"]["lengths"]["context"] == 20
    assert results["runs"][0]["hits"]["cached_tokens"] == 48
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert len(lines) == 24 and all(line["outcome"] == "answered" for line in lines)
    assert results["load"]["nonce"]
    assert lines[0]["messages"] != lines[-1]["messages"], "a run finds nothing of the one before it"
    page = (tmp_path / "report.html").read_text()
    assert (
        page.count("<svg") >= 6 and "too few" in page and "<script" not in page and "http-equiv" not in page
    )
    log = read_log(tmp_path / "requests.jsonl")
    assert log.with_prompts and log.with_answers and log.with_seconds and len(log.requests) == 24


def test_failures_are_told(heliostat: Heliostat, tmp_path: Path) -> None:
    async def full(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(refusal(503, b'{"error": {"message": "draining"}}'))

    with served(full) as url:
        said = heliostat("bench", "client", "--url", url, "--rate", 100, *FAST, "--out", tmp_path, "--json")
    (run,) = json.loads(said.stdout)["runs"]
    assert run["requests"]["outcomes"] == {"skipped": 8, "status 503": 4}
    assert run["goodput"]["share"]["value"] == 0.0 and "p50" in run["ttft"]
    assert "nothing" not in (tmp_path / "report.html").read_text()


def test_a_replay(heliostat: Heliostat, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    line = {"input_length": 1100, "output_length": 40, "hash_ids": [0, 1, 2]}
    trace.write_text("".join(json.dumps({"timestamp": 10 * n, **line}) + "\n" for n in range(5)))
    with served(well) as url:
        words = ["--url", url, "--trace", trace, "--scale", 0.1, "--speed", "1,2", "--members", "a,base"]
        said = heliostat("bench", "replay", *words, "--out", tmp_path / "out", "--max-length", 200)
    assert "trace.jsonl" in said.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["requests"]["answered"] for run in results["runs"]] == [5, 5]
    assert results["runs"][0]["rate"] is None and set(results["runs"][0]["by_member"]) <= {"a", "base"}


def test_ctrl_c_keeps_what_was_measured(heliostat: Heliostat, tmp_path: Path) -> None:
    asked: list[int] = []

    async def say(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        asked.append(1)
        if len(asked) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        await well(body, writer)

    with served(say) as url:
        words = ["--url", url, "--rate", "10,20", *FAST, "--sessions", 500, "--out", tmp_path]
        said = heliostat("bench", "client", *words, status=130)
    assert f"what was measured is in {tmp_path}" in said.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stopped"] and len(results["runs"]) == 1
    assert 3 <= results["runs"][0]["requests"]["answered"] <= 100
    assert "stopped early" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--members", "aa"], "did you mean 'a'"),
        (["--rate", "fast"], "rate is 'fast'"),
        (["--rate", "0"], "rate is '0'"),
        (["--workflow", "rect"], "react, reflexion, fanout"),
        (["--popularity", "zipf"], "zipf:S"),
        (["--pass-as", "words"], "text, ids"),
        (["--ttft", "0"], "must be above 0"),
        (["--spread", "2"], "spread is 2"),
        (["--key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY of --key-env is not set"),
    ],
)
def test_bad_input(heliostat: Heliostat, tmp_path: Path, words: list[str], told: str) -> None:
    with served(well) as url:
        assert (
            told
            in heliostat("bench", "client", "--url", url, *words, "--out", tmp_path / "o", status=2).stderr
        )
    assert not (tmp_path / "o").exists()


def test_nobody_to_measure(heliostat: Heliostat, tmp_path: Path) -> None:
    said = heliostat("bench", "client", "--url", "http://127.0.0.1:1/v1", "--out", tmp_path / "o", status=2)
    assert "is the server up?" in said.stderr and not (tmp_path / "o").exists()
