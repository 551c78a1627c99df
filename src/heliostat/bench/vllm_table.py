"""N separate vLLM servers, one vLLM server with an adapter for each member, and the family on vLLM by each sharing: the
same sessions by the same client through the same router, each system alone on the machine, in turns.

    HELIOSTAT_VLLM=.venv-vllm/bin/python python -m heliostat.bench.vllm_table --docs docs/results

Kind (A): measured. Random weights, so that answers are passed on as ids and mean nothing. A point is one system started
once; points are kept, and one that is there is not measured again. ``--plan`` prints what would run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from heliostat.bench.birth import certificate
from heliostat.bench.comparing import Kept, Silent, decisive
from heliostat.bench.decode import LONGEST, SHAPES, shape
from heliostat.bench.gpu_vllm import Plan, made
from heliostat.bench.vllm_page import SYSTEMS, page, picture, rows_of
from heliostat.build import describe_module, read_family, write_family
from heliostat.errors import Refused
from heliostat.family import BASE, SHARINGS, Member
from heliostat.files import atomic_write_text

PAGE = 32
"""Positions."""
STARTING = 900.0
"""Most seconds until a system answers."""
WARM_UP = 2
"""Sessions after each start that count for nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every system is asked."""

    shape: str = "24M"
    members: int = 3
    rate: float = 0.4
    """Sessions a second."""
    sessions: int = 6
    """Of a run."""
    repeats: int = 5
    """Runs of a start."""
    rounds: int = 1
    """Starts of each system; every other round in the opposite order."""
    turns: int = 1
    """Of a session: three calls each."""
    seed: int = 0
    cache_mib: int = 768
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
    return [f"{SYSTEMS[system].kind}-{number}" for number in range(load.members)]


def cluster_of(system: str, load: Load, place: Path) -> dict[str, Any]:
    """The cluster file of one system: every server runs on one thread, on cores in turns. vLLM's adapters on processors
    are many small operations, for which two threads only wait for each other."""
    both, owns = ["prefill", "decode"], [f"{member}.own" for member in members_of(system, load)]
    hosted: list[tuple[list[str], list[str]]] = [(both, [BASE, *owns])]
    if system == "separate":
        hosted = [(both, [own]) for own in owns]
    if system in ("prefillshare", "sun"):
        readers, speakers = ([BASE], owns) if system == "prefillshare" else (owns, [BASE])
        hosted = [(["prefill"], readers), (["decode"], speakers)]
    workers = [
        {"name": f"w{number}", "spawn": "vllm", "roles": roles, "modules": modules, "threads": 1}
        for number, (roles, modules) in enumerate(hosted)
    ]
    terms = {"dtype": load.dtype, "page_size": PAGE, "max_length": LONGEST}
    return {"family": str(place), "vllm": terms, "workers": workers}


def server_words(system: str, load: Load, place: Path, file: Path) -> list[str]:
    """The server's command."""
    cache = load.cache_mib // len(cluster_of(system, load, place)["workers"])
    words = ["heliostat", "serve", str(place), "--cluster", str(file), "--port", "0"]
    words += ["--cache-mib", str(cache), "--max-running", "32"]
    return [*words, *(word for member in members_of(system, load) for word in ("--member", member))]


def client_words(system: str, load: Load, *, turn: int, warm: bool = False) -> list[str]:
    """The client's command, without its url and its folder. No run finds what another left in a cache."""
    sessions, repeats = (WARM_UP, 1) if warm else (load.sessions, load.repeats)
    words = ["heliostat", "bench", "client", "--members", ",".join(members_of(system, load))]
    words += ["--rate", ",".join([f"{load.rate:g}"] * repeats), "--sessions", str(sessions)]
    words += ["--workflow", "react", "--turns", str(load.turns), "--pass-as", "ids", "--nonce", "table"]
    return [*words, "--seed", str(load.seed + 2 * turn + warm)]


def _run(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", "from heliostat.cli import main; main()", *words[1:]]


def _ask(words: Sequence[str], url: str, out: Path) -> None:
    silent = subprocess.DEVNULL
    whole = [*_run(words), "--url", url, "--out", str(out)]
    subprocess.run(whole, check=True, stdout=silent, stderr=silent)


@contextmanager
def served(words: Sequence[str], log: Path) -> Iterator[tuple[str, int]]:
    """(url, process) of a server while it runs. Refused where it does not answer."""
    process = subprocess.Popen(_run(words), stderr=subprocess.PIPE, text=True)
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


def machine_seconds() -> float:
    """Seconds that all cores of the machine have worked, for whomever."""
    numbers = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:]
    user, nice, system, _, _, interrupts, soft = map(int, numbers[:7])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def own_seconds(process: int) -> float:
    """Of these, a process with all below it, and what has been run from here."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = 0
    for number in (process, *_below(process)):
        try:
            fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        found += int(fields[11]) + int(fields[12])
    return spent.ru_utime + spent.ru_stime + found / os.sysconf("SC_CLK_TCK")


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


def point(system: str, load: Load, place: Path, folder: Path, *, turn: int) -> dict[str, Any]:
    """Start a system once, and measure it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(cluster_of(system, load, place), sort_keys=False), encoding="utf-8")
    with served(server_words(system, load, place, file), folder / "server.log") as (url, process):
        _ask(client_words(system, load, turn=turn, warm=True), url, folder / "warm")
        before, own = machine_seconds(), own_seconds(process)
        _ask(client_words(system, load, turn=turn), url, folder)
        busy, own = machine_seconds() - before, own_seconds(process) - own
        memory = memory_mib(process)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    lines = (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "memory_mib": round(memory),
        "others": max(0.0, 1 - own / busy),
        "runs": results["runs"],
        "sessions": sessions_of(map(json.loads, lines)),
    }


def sessions_of(records: Iterator[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """``run/session`` -> its scheduled start, its end (seconds), and whether all of it was answered."""
    found: dict[str, dict[str, Any]] = {}
    for one in records:
        told = found.setdefault(
            f"{one['run']}/{one['session']}", {"start": one["scheduled"], "end": 0.0, "answered": True}
        )
        told["start"] = min(told["start"], one["scheduled"])
        told["end"] = max(told["end"], one["end"])
        told["answered"] = told["answered"] and one["outcome"] == "answered"
    return found


def turns_of(load: Load) -> list[tuple[str, int]]:
    """(system, round) in the order in which they are measured."""
    names = list(SYSTEMS)
    return [(name, n) for n in range(load.rounds) for name in (names[::-1] if n % 2 else names)]


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    usual = Load()
    parser.add_argument("--shape", choices=SHAPES, default=usual.shape)
    for name in ("members", "sessions", "repeats", "rounds", "turns", "seed", "cache_mib"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(usual, name))
    parser.add_argument("--rate", type=float, default=usual.rate, help="sessions a second")
    parser.add_argument("--points", type=int, default=None, help="end after so many more")
    parser.add_argument("--docs", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("out/bench/vllm-table"))
    parser.add_argument("--plan", action="store_true", help="print the commands and end")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """See the module."""
    given = parsed(words)
    load = Load(**{name: getattr(given, name) for name in asdict(Load()) if hasattr(given, name)})
    if given.plan:
        for system, told in SYSTEMS.items():
            cluster = yaml.safe_dump(cluster_of(system, load, Path("FAM")), sort_keys=False)
            server = server_words(system, load, Path("FAM"), Path("cluster.yaml"))
            client = client_words(system, load, turn=0)
            print(f"# {told.told}\n{cluster}\n{shlex.join(server)}\n{shlex.join(client)}\n")
        return
    birth = certificate(f"python -m heliostat.bench.vllm_table {shlex.join(_asked(load))}".strip())
    kept = Kept(given.out, {**decisive(birth), "load": asdict(load)})
    missing = [(s, n) for s, n in turns_of(load) if f"{s}-{n}" not in kept.found][: given.points]
    with tempfile.TemporaryDirectory() as folder:
        place = family_of(Path(folder), load) if missing else Path()
        for system, turn in missing:
            name = f"{system}-{turn}"
            kept.get(name, partial(point, system, load, place, given.out / name, turn=turn), Silent())
    rows = rows_of(kept.found)
    text = json.dumps({"birth": birth, "load": asdict(load), "rows": rows}, indent=1) + "\n"
    done = len(kept.found) == len(turns_of(load))
    for folder_ in filter(None, (given.out, given.docs if done else None)):
        atomic_write_text(folder_ / "vllm-table.json", text)
        atomic_write_text(folder_ / "vllm-table.svg", picture(rows))
        atomic_write_text(folder_ / "vllm-table.md", page(rows, load=asdict(load), birth=birth))
    print(page(rows, load=asdict(load), birth=birth))


def _asked(load: Load) -> list[str]:
    usual = asdict(Load())
    changed = {name: value for name, value in asdict(load).items() if value != usual[name]}
    return [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", str(value))]


if __name__ == "__main__":
    main()
