"""N separate vLLM servers, one vLLM server with an adapter for each member, and the family on one vLLM server: the same
sessions by the same client through the same router, each system alone on the machine.

    HELIOSTAT_VLLM=.venv-vllm/bin/python python -m heliostat.bench.vllm_table --shape 24M --members 3 --docs docs/results

Kind (A): measured. Random weights, so that answers are passed on as ids and mean nothing. ``--plan`` prints what would run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from heliostat.bench.birth import certificate
from heliostat.bench.decode import SHAPES, shape
from heliostat.bench.gpu_vllm import Plan, made
from heliostat.build import describe_module, read_family, write_family
from heliostat.errors import Refused
from heliostat.family import BASE, SHARINGS, Member
from heliostat.files import atomic_write_text

PAGE = 32
"""Positions."""
STARTING = 900.0
"""Most seconds until a system answers."""
NAMES = {
    "separate": "a vLLM server for each member",
    "adapters": "one vLLM server, an adapter for each member",
    "family": "one vLLM server, the family in two streams",
}


@dataclass(frozen=True, slots=True)
class Load:
    """What every system is asked."""

    shape: str
    members: int
    rate: float
    sessions: int
    repeats: int
    seed: int
    cache_mib: int
    """For pages, of all servers of a system together."""
    dtype: str = "bfloat16"


def family_of(folder: Path, load: Load) -> Path:
    """A family of random weights with whole members besides those that ``gpu_vllm`` makes."""
    dtype = getattr(torch, load.dtype)
    place = made(folder, Plan("cpu", shape(load.shape), load.dtype, PAGE, members=load.members))
    config = LlamaConfig(**{key: value for key, value in shape(load.shape).items() if key != "model_type"})
    for number in range(load.members):
        torch.manual_seed(100 + number)
        name, path = f"whole-{number}", f"modules/whole-{number}.own"
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(place / path)
        family = read_family(place)
        module = describe_module(place, f"{name}.own", path, base=None, family=family)
        row = SHARINGS["independent"].instantiate(module.name)
        grown = family.with_module(module)
        digests = {one: grown.module(one).digest for one in row.modules}
        write_family(place, grown.with_member(Member(name, row, "independent", digests, {})))
    return place


def members_of(system: str, load: Load) -> list[str]:
    """Whom the client asks."""
    kind = {"separate": "whole", "adapters": "adapted", "family": "streamed"}[system]
    return [f"{kind}-{number}" for number in range(load.members)]


def cluster_of(system: str, load: Load, place: Path) -> dict[str, Any]:
    """The cluster file of one system: every server reads and speaks."""
    roles = ["prefill", "decode"]
    owns = [f"{member}.own" for member in members_of(system, load)]
    hosted = [[own] for own in owns] if system == "separate" else [[BASE, *owns]]
    workers = [
        {"name": f"w{number}", "spawn": "vllm", "roles": roles, "modules": modules}
        for number, modules in enumerate(hosted)
    ]
    terms = {"dtype": load.dtype, "page_size": PAGE, "max_length": 2048}
    return {"family": str(place), "vllm": terms, "workers": workers}


def words_of(system: str, load: Load, place: Path, file: Path) -> tuple[list[str], list[str]]:
    """(the server's command, the client's): the latter without its url and its folder."""
    members = members_of(system, load)
    cache = str(load.cache_mib // (load.members if system == "separate" else 1))
    server = ["heliostat", "serve", str(place), "--cluster", str(file), "--port", "0", "--cache-mib", cache]
    server += ["--max-running", "32", *(word for member in members for word in ("--member", member))]
    rates = ",".join([f"{load.rate:g}"] * load.repeats)
    client = [
        "heliostat",
        "bench",
        "client",
        "--members",
        ",".join(members),
        "--rate",
        rates,
        "--pass-as",
        "ids",
    ]
    client += [
        "--sessions",
        str(load.sessions),
        "--seed",
        str(load.seed),
        "--workflow",
        "react",
        "--nonce",
        "table",
    ]
    return server, client


@contextmanager
def served(words: Sequence[str], log: Path) -> Iterator[tuple[str, int]]:
    """(url, process) of a server while it runs. Refused where it does not answer."""
    started = [sys.executable, "-c", "from heliostat.cli import main; main()", *words[1:]]
    process = subprocess.Popen(started, stderr=subprocess.PIPE, text=True)
    address, ready = "", threading.Event()

    def read() -> None:
        nonlocal address
        assert process.stderr is not None
        with log.open("w", encoding="utf-8") as file:
            for line in process.stderr:
                file.write(line)
                if line.startswith("{") and json.loads(line)["event"] == "listening":
                    address = str(json.loads(line)["address"])
                    ready.set()
        ready.set()

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    try:
        if not ready.wait(STARTING) or not address:
            raise Refused(f"the server did not start: {log} says why")
        yield f"{address}/v1", process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reading.join(10)


def memory_mib(process: int) -> float:
    """MiB of a process and all below it, what they share counted once (Pss)."""
    found = 0
    for number in (process, *_below(process)):
        try:
            text = Path(f"/proc/{number}/smaps_rollup").read_text(encoding="utf-8")
        except OSError:
            continue  # it has ended
        found += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return found / 1024


def _below(process: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = [], [process]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def run(system: str, load: Load, place: Path, out: Path) -> dict[str, Any]:
    """Measure one system."""
    folder = out / system
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(cluster_of(system, load, place), sort_keys=False), encoding="utf-8")
    server, client = words_of(system, load, place, file)
    with served(server, folder / "server.log") as (url, process):
        words = [sys.executable, "-c", "from heliostat.cli import main; main()", *client[1:], "--url", url]
        subprocess.run([*words, "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
        memory = memory_mib(process)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return row_of(system, results["runs"], memory)


def row_of(system: str, runs: Sequence[Mapping[str, Any]], memory: float) -> dict[str, Any]:
    """One line of the table: medians over the runs."""

    def middle(*path: str) -> float | None:
        found = []
        for one in runs:
            value: Any = one
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            if isinstance(value, Mapping):
                value = value.get("value")
            if isinstance(value, int | float):
                found.append(float(value))
        return statistics.median(found) if found else None

    return {
        "system": system,
        "memory_mib": round(memory),
        "goodput": middle("goodput", "share"),
        "requests": middle("goodput", "requests"),
        "session_p95": middle("session", "p95"),
        "ttft_p95": middle("ttft", "p95"),
        "answer_tokens": middle("throughput", "answer_tokens"),
        "runs": len(runs),
    }


def page(rows: Sequence[Mapping[str, Any]], load: Load, birth: Mapping[str, Any]) -> str:
    """The page that is committed."""
    heads = ["", "memory MiB", "goodput", "good requests/s", "session p95 s", "TTFT p95 s", "answer tokens/s"]
    keys = ["memory_mib", "goodput", "requests", "session_p95", "ttft_p95", "answer_tokens"]
    lines = ["# A family on vLLM, beside separate servers and adapters", ""]
    lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = ["-" if row[key] is None else f"{row[key]:.3g}" for key in keys]
        lines.append(f"| {NAMES[row['system']]} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Medians of {load.repeats} runs of {load.sessions} ReAct sessions at {load.rate:g} a second, {load.members} "
        f"members, shape {load.shape}, {load.dtype}, random weights; pages of {load.cache_mib} MiB for each system in all. "
        "Systems ran one after the other; memory is of all processes, shared parts once (Pss). A 95th percentile of few "
        "sessions says little.",
        "",
        f"`{birth['command']}`, {birth['hardware']}, commit {birth['commit']}, {birth['date']}.",
        "",
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="24M")
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--rate", type=float, default=0.5, help="sessions a second")
    parser.add_argument("--sessions", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-mib", type=int, default=768)
    parser.add_argument("--docs", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("out/bench/vllm-table"))
    parser.add_argument("--plan", action="store_true", help="print the commands and end")
    given = parser.parse_args(words)
    load = Load(
        given.shape, given.members, given.rate, given.sessions, given.repeats, given.seed, given.cache_mib
    )
    if given.plan:
        for system in NAMES:
            server, client = words_of(system, load, Path("FAM"), Path("cluster.yaml"))
            print(
                f"# {NAMES[system]}\n{yaml.safe_dump(cluster_of(system, load, Path('FAM')), sort_keys=False)}"
            )
            print(f"{shlex.join(server)}\n{shlex.join(client)}\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        place = family_of(Path(folder), load)
        rows = [run(system, load, place, given.out) for system in NAMES]
    birth = certificate(
        shlex.join([Path(sys.executable).name, "-m", "heliostat.bench.vllm_table", *sys.argv[1:]])
    )
    text = json.dumps({"birth": birth, "rows": rows}, indent=1) + "\n"
    for folder_ in filter(None, (given.out, given.docs)):
        atomic_write_text(folder_ / "vllm-table.json", text)
        atomic_write_text(folder_ / "vllm-table.md", page(rows, load, birth))
    print(page(rows, load, birth))


if __name__ == "__main__":
    main()
