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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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


def made(folder: Path, model: Mapping[str, Any], members: int, dtype: torch.dtype) -> Path:
    """A family in ``folder`` with so many members of each kind, adapters of rank 16 filled by chance."""
    torch.manual_seed(0)
    config = LlamaConfig(**{key: value for key, value in model.items() if key != "model_type"})
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(EMBEDDED_BASE).save_pretrained(folder / "base")
    place = folder / "fam"
    init_family(place, folder / "base")
    inside = load_transformer(place / BASE, read_config(place / BASE), dtype=dtype)
    for kind, sharing in PLAYED.items():
        targets = TARGETS[SHARINGS[sharing].targets]
        for number in range(members):
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
    ) -> tuple[list[list[int]], float]:
        """Answers of one worker that does all, and its seconds."""
        rows = [self.family.row(member) for member in members]
        requests = [
            self.request(row.speaker, ids, self.plan.tokens, wire.alone(self.digest(row.answer_writer)))
            for row, ids in zip(rows, asked, strict=True)
        ]
        done, seconds = worker.timed(requests)
        return [one["tokens"] for one in done], seconds

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


def exact(python: str, device: str, folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Of every sharing, how many answers of a small family in float32 are the embedded engine's, token by token."""
    plan = replace(TINY, device=device, tokens=12, batches=(16,), page_size=32)
    stand = Stand(made(folder, SMALL, plan.members, torch.float32), plan, python)
    llm = LLM(stand.place, dtype="float32", cache_mib=64)
    asked = [ids for n in (1, 31, 32, 33) for ids in prompts(2, n, length=n)]
    found: dict[str, Any] = {}

    def compare(kind: str, members: Sequence[str], answers: Sequence[list[int]]) -> None:
        wanted = llm.generate(asked, member=members, max_tokens=plan.tokens, ignore_eos=True)
        same = sum(list(want.ids) == got for want, got in zip(wanted, answers, strict=True))
        found[PLAYED[kind]] = {"same": same, "asked": len(asked)}

    halves = (
        stand.launch("reader", ["handed"], role="prefill"),
        stand.launch("speaker", ["spoken"], role="decode"),
    )
    with offline(*halves, python=python, log=folder, environment=environment) as (reader, speaker):
        for kind in ("handed", "spoken"):
            members = stand.members(kind, len(asked))
            long = [
                ids if len(ids) > 1 else [*ids, 5] for ids in asked
            ]  # nothing stands below the boundary of one token
            asked[:] = long
            compare(kind, members, stand.apart(reader, speaker, members, asked)[0])
    for kind in ("streamed", "adapted"):
        one = stand.launch(kind, [kind], two_streams=kind == "streamed")
        with offline(one, python=python, log=folder, environment=environment) as (worker,):
            members = stand.members(kind, len(asked))
            compare(kind, members, stand.alone(worker, members, asked)[0])
    return found


def measured(python: str, plan: Plan, folder: Path, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """Answer tokens a second of each way of sharing at each batch, fresh prompts; of halves, the speaking one's."""
    dtype = getattr(torch, plan.dtype)
    stand = Stand(made(folder, plan.model, plan.members, dtype), plan, python)
    rows: list[dict[str, Any]] = []

    def batches(kind: str, ask: Any) -> None:
        for batch in plan.batches:
            seconds = []
            for number in range(plan.repeats + 1):
                asked = prompts(batch, 10**6 * batch + 100 * len(rows) + number, length=plan.prompt)
                seconds.append(ask(stand.members(kind, batch), asked))
            reading, speaking = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
            told = {"sharing": PLAYED[kind], "batch": batch, "reading": reading}
            rows.append({**told, "tokens_per_second": batch * plan.tokens / speaking})

    halves = (
        stand.launch("reader", ["handed"], role="prefill"),
        stand.launch("speaker", ["spoken"], role="decode"),
    )
    with offline(*halves, python=python, log=folder, environment=environment) as (reader, speaker):
        for kind in ("handed", "spoken"):
            batches(kind, lambda members, asked: stand.apart(reader, speaker, members, asked)[1:])
    for kind in ("streamed", "adapted"):
        one = stand.launch(kind, [kind], two_streams=kind == "streamed")
        with offline(one, python=python, log=folder, environment=environment) as (worker,):
            batches(kind, lambda members, asked, w=worker: (0.0, stand.alone(w, members, asked)[1]))
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
    plan = TINY if asked.dry_run else Plan(asked.device, LLAMA_8B, "bfloat16", 16, repeats=asked.repeats)
    out = Path(tempfile.mkdtemp()) if asked.dry_run else asked.out
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "small").mkdir()
        (Path(folder) / "large").mkdir()
        inherited = environment or {}
        found = {
            "exact": exact(asked.python, plan.device, Path(folder) / "small", inherited),
            "measured": measured(asked.python, plan, Path(folder) / "large", inherited),
        }
    command = "python -m heliostat.bench.gpu_vllm" + (" --dry-run" if asked.dry_run else "")
    birth = certificate(command, dtype=plan.dtype, repeats=plan.repeats, members=plan.members)
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / "vllm.json", json.dumps({"birth": birth, **found}, indent=1) + "\n")
    print(f"written: {out / 'vllm.json'}")


if __name__ == "__main__":
    main()
