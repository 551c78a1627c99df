"""The engine's speed beside transformers, vLLM and OpenVINO GenAI: the same random weights, fresh prompts, greedy.

Each engine runs in a process of its own, one after the other, in rounds; medians over the rounds. Resumable: what was
measured at this commit is kept under ``--work``, and only what is missing is run. HELIOSTAT_VLLM and HELIOSTAT_OPENVINO
name the Python of an environment that has the peer (``make vllm-env``); a peer that is not there is left out, and the
page says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from heliostat.bench import decode, peer
from heliostat.bench.birth import certificate
from heliostat.errors import Refused
from heliostat.files import atomic_write_text, read_json

LENGTHS = (128, 512, 2048)
PEERS = ("transformers", "vllm", "openvino")
PYTHONS = {"vllm": "HELIOSTAT_VLLM", "openvino": "HELIOSTAT_OPENVINO"}
PARTS = "parts"
"""The piece that measures a step of ours beside its own parts."""
SECONDS = 600
Found = Mapping[str, Any]


def python_of(engine: str) -> str | None:
    """The interpreter that an engine runs in; None where a peer is not there."""
    return os.environ.get(PYTHONS[engine]) or None if engine in PYTHONS else sys.executable


def write_model(folder: Path, name: str) -> None:
    """A checkpoint of random weights in bfloat16, once."""
    if (folder / "config.json").exists():
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made: Any = LlamaForCausalLM(LlamaConfig(**decode.shape(name)))
    made.to(torch.bfloat16).save_pretrained(folder)


def run(name: str, engine: str, folder: Path, number: int) -> dict[str, Any]:
    """One engine, or our own parts, in a process of its own."""
    python = python_of(engine)
    assert python is not None
    if engine == PARTS:
        command = [python, "-m", "heliostat.bench.decode", str(folder), str(1000 * number)]
    else:
        spec = peer.Spec(
            engine=engine,
            folder=str(folder),
            threads=torch.get_num_threads(),
            seed=number,
            batches=list(decode.BATCHES),
            prompt=decode.PROMPT,
            steps=decode.STEPS,
            lengths=list(LENGTHS),
            most=decode.LONGEST,
        )
        # -P: the files beside peer.py are no modules to a peer.
        command = [python, "-P", peer.__file__, json.dumps(vars(spec))]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=env)
    if done.returncode:
        raise Refused(f"{engine} on {name} failed with {python}:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def pieces(models: Sequence[str], repeats: int) -> list[tuple[str, str, int]]:
    """(model, engine, round), each engine once a round, every round beginning with another."""
    engines = [PARTS, "heliostat", *(each for each in PEERS if python_of(each))]
    turned = [
        engines[number % len(engines) :] + engines[: number % len(engines)] for number in range(repeats)
    ]
    return [
        (name, engine, number) for number in range(repeats) for name in models for engine in turned[number]
    ]


def measure(todo: Sequence[tuple[str, str, int]], work: Path, *, minutes: float) -> bool:
    """Run what is missing, for at most so long; whether everything is there."""
    end = time.monotonic() + 60 * minutes
    for name, engine, number in todo:
        kept = work / f"{name}-{engine}-{number}.json"
        if kept.exists():
            continue
        if time.monotonic() > end:
            return False
        folder = work.parent / name
        write_model(folder, name)
        found = run(name, engine, folder, number)
        atomic_write_text(kept, json.dumps(found, indent=1) + "\n")
        print(f"{name} {engine} {number}: {json.dumps(found)}", flush=True)
    return True


def gathered(todo: Sequence[tuple[str, str, int]], work: Path) -> dict[str, dict[str, Any]]:
    """Medians over the rounds by model and engine, numbers as they were nested."""
    found: dict[str, dict[str, list[Any]]] = {}
    for name, engine, number in todo:
        piece = read_json(work / f"{name}-{engine}-{number}.json")
        found.setdefault(name, {}).setdefault(engine, []).append(piece)
    return {name: {engine: _median(all_) for engine, all_ in own.items()} for name, own in found.items()}


def _median(some: Sequence[Any]) -> Any:
    if isinstance(some[0], Mapping):
        return {key: _median([each[key] for each in some]) for key in some[0]}
    return some[0] if isinstance(some[0], str) else statistics.median(some)


def page(found: Mapping[str, Found], birth: Found) -> str:
    """The results as Markdown."""
    lines = [
        "# The engine's speed",
        "",
        f"Random weights of a Llama's shape, fresh prompts, greedy, {birth['threads']} threads; each engine in a process of",
        f"its own, one after the other, in {birth['repeats']} rounds; medians.",
        "",
        f"`{birth['command']}`; {birth['hardware']}; commit {birth['commit']}; {birth['date']}",
    ]
    for name, engines in found.items():
        lines += ["", f"## {name}", "", *_engines(engines), *_left_out(engines), "", *_parts(engines[PARTS])]
    return "\n".join([*lines, ""])


def _engines(engines: Mapping[str, Found]) -> list[str]:
    own = engines["heliostat"]
    batches, lengths = own["decode"], own["prefill"]
    head = ["engine", *(f"decode, batch {b}" for b in batches), *(f"prompt of {n}" for n in lengths)]
    lines = [
        f"Tokens a second. Decoding: prompts of {decode.PROMPT} tokens, the median time between {decode.STEPS} answer",
        "tokens. Prompts: one at a time, to the first token. In brackets: how many times as fast heliostat is.",
        "",
        _row(head),
        _row(["---"] * len(head)),
    ]
    for name, engine in engines.items():
        if name == PARTS:
            continue
        cells = [
            *(_against(int(b), engine["decode"][b], own["decode"][b]) for b in batches),
            *(_against(int(n), engine["prefill"][n], own["prefill"][n]) for n in lengths),
        ]
        lines.append(_row([f"{name} ({engine['what']})", *cells]))
    return lines


def _against(tokens: int, seconds: float, ours: float) -> str:
    return f"{tokens / seconds:.0f}" + ("" if seconds == ours else f" ({seconds / ours:.2f}x)")


def _left_out(engines: Mapping[str, Found]) -> list[str]:
    missing = [each for each in PEERS if each not in engines]
    if not missing:
        return []
    names = ", ".join(f"{each} ({PYTHONS[each]} names no Python)" for each in missing)
    return ["", f"Left out: {names}."]


def _parts(own: Found) -> list[str]:
    share = own["planning"] / own["busy"]
    lines = [
        "A step of heliostat beside its own parts: *bare* are its products and attention alone, each layer over pages of",
        "its own, called one by one, so that a whole step, which is one call, may take less; *memory* is one reading of all",
        "weights at the speed that reading reaches here. Less is better.",
        f"Scheduling and laying out passes take {share:.1%} of a step at {decode.MOST_RUNNING} running requests.",
        "",
        "| batch | step, ms | step / bare | step / memory |",
        "|---|---|---|---|",
    ]
    return lines + [
        _row([b, f"{1e3 * step:.2f}", f"{step / own['bare'][b]:.2f}x", f"{step / own['memory']:.2f}x"])
        for b, step in own["step"].items()
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure what is missing and, when nothing is, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="100M", help=f"of {', '.join(decode.SHAPES)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=60, help="begin nothing new after so long")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("out/bench-engine"))
    given = parser.parse_args()
    command = f"python -m heliostat.bench.engine --models {given.models} --repeats {given.repeats}"
    birth = certificate(command, repeats=given.repeats)
    work = given.work / birth["commit"]
    work.mkdir(parents=True, exist_ok=True)
    todo = pieces(given.models.split(","), given.repeats)
    if not measure(todo, work, minutes=given.minutes):
        print("not finished: run it again to go on")
        return
    found = gathered(todo, work)
    given.docs.mkdir(parents=True, exist_ok=True)
    whole = json.dumps({"birth": birth, "found": found}, indent=1)
    atomic_write_text(given.docs / "engine.json", whole + "\n")
    atomic_write_text(given.docs / "engine.md", page(found, birth))


if __name__ == "__main__":
    main()
