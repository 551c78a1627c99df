"""Members of a family on one GPU, by every way of sharing: consolidation, not several machines.

Random weights. What is told: the memory of the weights, a step in which every request gets a token, and how long it takes
until all members have read one common context.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from heliostat.bench.systems import SYSTEMS, WHOLE, System, member_names, rank
from heliostat.bench.trial import EMBEDDED_BASE
from heliostat.build import Loaded, best_dtype
from heliostat.engine.engine import PAGE_SIZE, Engine
from heliostat.engine.request import Request, Sampling
from heliostat.family import BASE
from heliostat.linear.lora import add_adapter
from heliostat.model.config import ModelConfig, parse_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.train.recipe import TARGETS

LLAMA_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
SPARE = 8 * 2**30
"""Bytes that are left for pages and activations."""


@dataclass(frozen=True, slots=True)
class Families:
    """What is measured."""

    device: str
    model: Mapping[str, Any]
    whole: int = 4
    """Members with whole models of their own; ``adapted``: members with adapters."""
    adapted: int = 8
    each: Sequence[int] = (1, 4)
    """Requests a member that decode at once."""
    prompt: int = 256
    context: int = 2048
    steps: int = 16
    repeats: int = 5


class Rack:
    """Modules on one device; each is made when it is first asked for."""

    def __init__(self, plan: Families) -> None:
        self.plan, self.config = plan, parse_config(plan.model)
        self.tokenizer = Tokenizer.load(EMBEDDED_BASE)
        self._loaded: dict[str, Loaded] = {}

    def members(self, system: System) -> tuple[str, ...]:
        """As many as were asked for, or as fit beside a base that everybody may need."""
        if system.kind != WHOLE:
            return member_names(self.plan.adapted)
        count = self.plan.whole
        if torch.device(self.plan.device).type == "cuda":
            one = self.config.parameters * best_dtype(self.plan.device).itemsize
            room = torch.cuda.get_device_properties(self.plan.device).total_memory - SPARE
            count = max(1, min(count, room // one - 1))
        return member_names(count)

    def engine(self, system: System, *, most: int, tokens: int) -> Engine:
        """A fresh engine with room for ``most`` requests of ``tokens`` tokens each."""
        names = dict.fromkeys(m for row in system.rows(self.members(system)).values() for m in row.modules)
        modules = {name: self._module(name, system) for name in names}
        pages = most * -(-tokens // PAGE_SIZE)
        longest = self.config.max_length
        return Engine(modules, self.tokenizer, max_length=longest, pages=pages, max_running=most)

    def bytes(self, system: System) -> int:
        """Memory of the base or of whole models; adapters are not counted."""
        names = {m for row in system.rows(self.members(system)).values() for m in row.modules}
        weights = {self._module(name, system).weights for name in names}
        return len(weights) * self.config.parameters * best_dtype(self.plan.device).itemsize

    def _module(self, name: str, system: System) -> Loaded:
        if name not in self._loaded:
            whole = name == BASE or system.kind == WHOLE
            self._loaded[name] = self._made(name) if whole else self._worn(name, system)
        return self._loaded[name]

    def _made(self, name: str) -> Loaded:
        return Loaded(
            name, f"random {name}", name, random_model(self.config, self.plan.device, len(self._loaded))
        )

    def _worn(self, name: str, system: System) -> Loaded:
        base = self._module(BASE, system).model
        r = rank(self.config.width)
        add_adapter(base, name, r=r, alpha=2 * r, targets=TARGETS[system.kind])
        base.to(base.dtype).requires_grad_(False)
        return Loaded(name, f"random {name}", BASE, base, name)


def random_model(config: ModelConfig, device: str, seed: int) -> Transformer:
    """Weights by chance, made where they stay and in the number format that they stay in."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(best_dtype(device)).to_empty(device=device)
    model.register_buffer("frequencies", Transformer.rotary(config).to(device), persistent=False)
    chance = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.02, generator=chance)
    model.requires_grad_(False).join()
    return model


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _ask(
    engine: Engine, system: System, whom: Sequence[str], prompts: Sequence[Sequence[int]], tokens: int
) -> None:
    rows = system.rows(sorted(set(whom)))
    wish = Sampling(max_tokens=tokens, ignore_eos=True)
    for number, (member, prompt) in enumerate(zip(whom, prompts, strict=True)):
        digests = {name: engine.digests[name] for name in rows[member].modules}
        name = f"{member}/{number}/{time.perf_counter_ns()}"
        engine.add(Request(name, row=rows[member], digests=digests, prompt=tuple(prompt), sampling=wish))


def _random_ids(count: int, length: int, seed: int) -> list[list[int]]:
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(3, 500, (count, length), generator=chance).tolist()


def decoding(rack: Rack, system: System, each: int, seed: int) -> float:
    """Median seconds of a step in which every request of every member gets a token."""
    plan, whom = rack.plan, rack.members(system) * each
    engine = rack.engine(system, most=len(whom), tokens=plan.prompt + plan.steps + PAGE_SIZE)
    _ask(engine, system, whom, _random_ids(len(whom), plan.prompt, seed), plan.steps + 1)
    seconds = []
    while engine.unfinished:
        began = time.perf_counter()
        said = len(engine.step())
        if said == len(whom) and all(chunk.stop - chunk.start == 1 for chunk in engine.latest.chunks):
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])  # the first ones record passes


def reading(rack: Rack, system: System, seed: int) -> float:
    """Seconds until all members, one after another, have said a first token behind one common context."""
    plan, whom = rack.plan, rack.members(system)
    engine = rack.engine(system, most=len(whom), tokens=plan.context + 2 * PAGE_SIZE)
    (context,) = _random_ids(1, plan.context, seed)
    _wait(plan.device)
    began = time.perf_counter()
    for member in whom:
        _ask(engine, system, [member], [context], 1)
        while engine.unfinished:
            engine.step()
    _wait(plan.device)
    return time.perf_counter() - began


def consolidated(plan: Families) -> list[dict[str, Any]]:
    """A row for every system: whole models first, then adapters on the base; medians, systems in turn."""
    rack = Rack(plan)
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[tuple[str, str], list[float]] = {}
    for number in range(plan.repeats + 1):
        for name, system in SYSTEMS.items():
            found = {str(each): decoding(rack, system, each, 100 * number + each) for each in plan.each}
            found["context"] = reading(rack, system, number)
            members = len(rack.members(system))
            rows[name] = {"system": name, "members": members, "bytes": rack.bytes(system)}
            for what, took in found.items() if number else ():  # the first round warms up
                runs.setdefault((name, what), []).append(took)
    for (name, what), times in runs.items():
        rows[name][what] = statistics.median(times)
    return list(rows.values())


def tables(rows: Sequence[Mapping[str, Any]], each: Sequence[int], context: int) -> list[str]:
    """As Markdown."""
    heads = ["system", "members", "weights, GiB", *(f"tokens/s, {count} a member" for count in each)]
    lines = [[*heads, f"all read {context} tokens, ms"], ["---"] * (len(heads) + 1)]
    for row in rows:
        rates = [f"{row['members'] * count / row[str(count)]:.0f}" for count in each]
        gib, read = f"{row['bytes'] / 2**30:.1f}", f"{1e3 * row['context']:.1f}"
        lines.append([row["system"], str(row["members"]), gib, *rates, read])
    return [
        "",
        "Members of a family on this one GPU (consolidation, not several machines): tokens a second of all members while "
        "each has so many requests, and until all, one after another, have a first token behind one context.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in lines),
    ]
