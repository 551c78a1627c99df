"""A family on vLLM on one device: is it token-exact beside the embedded engine, and what does each way of sharing take.

Random weights. Workers are processes of an environment with vLLM and heliostat (``--python``). Of halves the seconds of
reading and of speaking are told apart; who does all alone reads within its seconds of speaking. ``--dry-run`` runs all of
it with a tiny shape on the CPU: it shows that the script works, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from heliostat.bench.birth import certificate
from heliostat.bench.decode import prompts
from heliostat.bench.gpu_families import LLAMA_8B
from heliostat.bench.trial import EMBEDDED_BASE
from heliostat.bench.vllm_offline import Offline, offline
from heliostat.build import BASE, describe_module, init_family, read_family, write_family
from heliostat.errors import Refused
from heliostat.family import SHARINGS, Family, Member
from heliostat.files import atomic_write_text
from heliostat.linear.adapter import save_adapter
from heliostat.linear.lora import adapter_of, add_adapter
from heliostat.llm import LLM
from heliostat.model.config import read_config
from heliostat.model.weights import load_transformer
from heliostat.train.recipe import TARGETS
from heliostat.vllm import layout, wire
from heliostat.vllm.launch import Launch

PLAYED = {"handed": "sun", "spoken": "prefillshare", "streamed": "icarus", "adapted": "independent"}
"""Beginning of a member's name -> its sharing."""
SMALL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
"""Of the family whose tokens are compared."""


Ask = Callable[[Sequence[str], Sequence[list[int]]], tuple[list[list[int]], float, float]]
"""Members and their prompts -> their answers, seconds of reading apart, seconds of the rest."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    device: str
    model: Mapping[str, Any]
    dtype: str
    page_size: int
    members: int = 4
    batches: Sequence[int] = (1, 8, 32)
    prompt: int = 512
    tokens: int = 128
    repeats: int = 5
    cache_mib: int = 16384


TINY = Plan(
    "cpu", SMALL, "float32", 32, members=2, batches=(2,), prompt=40, tokens=4, repeats=1, cache_mib=64
)


def made(folder: Path, plan: Plan) -> Path:
    """A family in ``folder`` with its members of each kind, adapters of rank 16 filled by chance."""
    torch.manual_seed(0)
    dtype = getattr(torch, plan.dtype)
    shape = {key: value for key, value in plan.model.items() if key != "model_type"}
    shape["initializer_range"] = shape["hidden_size"] ** -0.5  # weights that say something
    config = LlamaConfig(**shape)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(EMBEDDED_BASE).save_pretrained(folder / "base")
    place = folder / "fam"
    init_family(place, folder / "base")
    inside = load_transformer(place / BASE, read_config(place / BASE), dtype=dtype)
    for kind, sharing in PLAYED.items():
        targets = TARGETS[SHARINGS[sharing].targets]
        for number in range(plan.members):
            name = f"{kind}-{number}"
            add_adapter(inside, name, r=16, alpha=32, targets=targets)
            for part in adapter_of(inside, name).values():
                torch.nn.init.normal_(part.a, std=part.a.shape[1] ** -0.5)
                torch.nn.init.normal_(part.b, std=0.2 * part.b.shape[1] ** -0.5)
            save_adapter(place / f"modules/{name}.own", inside, name, r=16, alpha=32, base="base")
            family = read_family(place)
            module = describe_module(place, f"{name}.own", f"modules/{name}.own", base=BASE, family=family)
            row = SHARINGS[sharing].instantiate(module.name)
            grown = family.with_module(module)
            digests = {one: grown.module(one).digest for one in row.modules}
            write_family(place, grown.with_member(Member(name, row, sharing, digests, {})))
    return place


class Stand:
    """A family's workers on one device, and how its members are asked."""

    def __init__(self, place: Path, plan: Plan, python: str) -> None:
        self.place, self.plan, self.python = place, plan, python
        self.family: Family = read_family(place)

    def launch(self, name: str, kinds: Sequence[str], **more: Any) -> Launch:
        """A worker of the base and the adapters of these kinds of members."""
        plan = self.plan
        names = [f"{kind}-{number}.own" for kind in kinds for number in range(plan.members)]
        hosted = layout.prepared(self.place, self.family, [BASE, *names])
        facts: dict[str, Any] = {
            "dtype": plan.dtype,
            "page_size": plan.page_size,
            "max_length": plan.prompt + plan.tokens + plan.page_size,
            "max_running": max(plan.batches),
            "cache_mib": plan.cache_mib,
            "device": plan.device.partition(":")[0],
            "cores": "nobind",
            "incarnation": name,
            "folder": str(self.place.parent / "handed"),
            "fit": layout.fit(self.place, self.family, dtype=plan.dtype, page_size=plan.page_size),
            "zero": layout.zero_adapter(self.place, self.family, BASE),
        }
        if plan.device != "cpu":
            facts["extra"] = ("--gpu-memory-utilization", "0.45")
        adapters = tuple(hosted[name] for name in names)
        return Launch(name=name, weights=hosted[BASE], adapters=adapters, **{**facts, **more})

    def members(self, kind: str, batch: int) -> list[str]:
        """Who is asked by a batch, in turn."""
        return [f"{kind}-{number % self.plan.members}" for number in range(batch)]

    def request(
        self, module: str, ids: Sequence[int], count: int, params: Mapping[str, Any]
    ) -> dict[str, Any]:
        """As ``vllm.offline`` takes it."""
        model = f"{module}#{self.digest(module)[:12]}"
        return {"model": model, "prompt": list(ids), "max_tokens": count, wire.PARAMS: dict(params)}

    def digest(self, module: str) -> str:
        """Of a module."""
        return self.family.module(module).digest

    def alone(
        self, worker: Offline, members: Sequence[str], asked: Sequence[list[int]]
    ) -> tuple[list[list[int]], float, float]:
        """Answers of one worker that does all, no seconds of reading apart, and its seconds."""
        rows = [self.family.row(member) for member in members]
        requests = [
            self.request(row.speaker, ids, self.plan.tokens, wire.alone(self.digest(row.answer_writer)))
            for row, ids in zip(rows, asked, strict=True)
        ]
        done, seconds = worker.timed(requests)
        return [one["tokens"] for one in done], 0.0, seconds

    def apart(
        self, reader: Offline, speaker: Offline, members: Sequence[str], asked: Sequence[list[int]]
    ) -> tuple[list[list[int]], float, float]:
        """Answers of two, the seconds of reading, and those of speaking."""
        rows = [self.family.row(member) for member in members]
        read, spoken, firsts = [], [], []
        for row, ids in zip(rows, asked, strict=True):
            bound, writer = row.boundary(len(ids)), row.prompt_writer
            read.append(self.request(writer, ids[:bound], 1, wire.keep(self.digest(writer), bound)))
        said, reading = reader.timed(read)
        for row, ids, one in zip(rows, asked, said, strict=True):
            bound = row.boundary(len(ids))
            first = one["tokens"] if bound == len(ids) else []
            params = wire.load(one["params"], self.digest(row.prompt_writer), bound)
            spoken.append(self.request(row.speaker, [*ids, *first], self.plan.tokens - len(first), params))
            firsts.append(first)
        done, speaking = speaker.timed(spoken)
        answers = [first + one["tokens"] for first, one in zip(firsts, done, strict=True)]
        return answers, reading, speaking


def kinds(stand: Stand, folder: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, Ask]]:
    """Each kind of member with a way to ask it; what it takes runs while it is asked."""
    started = partial(offline, python=stand.python, log=folder, environment=environment)
    halves = (
        stand.launch("reader", ["handed"], role="prefill"),
        stand.launch("speaker", ["spoken"], role="decode"),
    )
    with started(*halves) as (reader, speaker):
        for kind in ("handed", "spoken"):
            yield kind, partial(stand.apart, reader, speaker)
    for kind in ("streamed", "adapted"):
        with started(stand.launch(kind, [kind], two_streams=kind == "streamed")) as (worker,):
            yield kind, partial(stand.alone, worker)


def exact(stand: Stand, llm: LLM, kind: str, ask: Ask) -> dict[str, Any]:
    """How many answers are the embedded engine's, token by token."""
    asked = [ids for n in (2, 31, 32, 33) for ids in prompts(2, n, length=n)]
    members = stand.members(kind, len(asked))
    answers, _, _ = ask(members, asked)
    wanted = llm.generate(asked, member=members, max_tokens=stand.plan.tokens, ignore_eos=True)
    same = sum(list(want.ids) == got for want, got in zip(wanted, answers, strict=True))
    return {"sharing": PLAYED[kind], "same": same, "asked": len(asked)}


def measured(stand: Stand, kind: str, ask: Ask) -> list[dict[str, Any]]:
    """Seconds of each batch, fresh prompts each time; the first time is not counted."""
    rows, plan = [], stand.plan
    for batch in plan.batches:
        seconds = []
        for number in range(plan.repeats + 1):
            asked = prompts(batch, 10**6 * batch + number, length=plan.prompt)
            seconds.append(ask(stand.members(kind, batch), asked)[1:])
        reading, speaking = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
        told = {"sharing": PLAYED[kind], "batch": batch, "tokens": plan.tokens}
        rows.append({**told, "reading": reading, "speaking": speaking})
    return rows


def main(given: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Compare, measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", required=True, help="of an environment with vLLM and heliostat")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/bench-gpu"))
    parser.add_argument(
        "--dry-run", action="store_true", help="a tiny shape on the CPU, into a temporary folder"
    )
    asked = parser.parse_args(given)
    if not asked.dry_run and not torch.cuda.is_available():
        raise Refused(f"device is {asked.device}; this measures a GPU: take a machine with one, or --dry-run")
    small = replace(TINY, device="cpu" if asked.dry_run else asked.device)
    out = Path(tempfile.mkdtemp()) if asked.dry_run else asked.out
    compared: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as named:
        folder = Path(named)
        stand = Stand(made(folder / "small", small), small, asked.python)
        llm = LLM(stand.place, dtype="float32", cache_mib=64)
        for kind, ask in kinds(stand, folder, environment or {}):
            compared.append(exact(stand, llm, kind, ask))
            rows += measured(stand, kind, ask) if asked.dry_run else []
        plan = small if asked.dry_run else Plan(asked.device, LLAMA_8B, "bfloat16", 16, repeats=asked.repeats)
        if not asked.dry_run:
            stand = Stand(made(folder / "large", plan), plan, asked.python)
            for kind, ask in kinds(stand, folder, environment or {}):
                rows += measured(stand, kind, ask)
    found = {"exact": compared, "measured": rows}
    command = "python -m heliostat.bench.gpu_vllm" + (" --dry-run" if asked.dry_run else "")
    birth = certificate(command, dtype=plan.dtype, repeats=plan.repeats, members=plan.members)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / "vllm.json", json.dumps({"birth": birth, **found}, indent=1) + "\n")
    print(f"written: {out / 'vllm.json'}")


if __name__ == "__main__":
    main()
