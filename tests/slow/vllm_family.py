"""A family of every sharing for vLLM's tests, filled by chance; the embedded engine's answers; vLLM workers to ask."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, PreTrainedModel

from heliostat.bench.trial import EMBEDDED_BASE
from heliostat.bench.vllm_offline import Offline
from heliostat.bench.vllm_offline import offline as workers
from heliostat.build import BASE, describe_module, init_family, read_family, write_family
from heliostat.family import SHARINGS, Member
from heliostat.linear import paca
from heliostat.linear.adapter import save_adapter
from heliostat.linear.lora import adapter_of, add_adapter
from heliostat.model.config import read_config
from heliostat.model.weights import load_transformer
from heliostat.vllm import layout
from heliostat.vllm.launch import Launch

ROOT = Path(__file__).parents[2]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ASKS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
MEMBERS = {
    "solo": ("independent", "full"),
    "solo-a": ("independent", "adapter"),
    "sun-f": ("sun", "full"),
    "sun-a": ("sun", "adapter"),
    "sun-b": ("sun", "adapter"),
    "pre-f": ("prefillshare", "full"),
    "pre-a": ("prefillshare", "adapter"),
    "pre-b": ("prefillshare", "columns"),
    "ica-a": ("icarus", "adapter"),
    "ica-b": ("icarus", "columns"),
}


def python() -> str:
    """Of an environment with vLLM; skips the test where there is none."""
    found = os.environ.get("HELIOSTAT_VLLM")
    if not found:
        pytest.skip("HELIOSTAT_VLLM names no Python of an environment with vLLM (make vllm-env)")
    return found


def base(config: Any, seed: int = 0) -> PreTrainedModel:
    """A model filled by chance, of weights that say something."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def family(folder: Path, config: Any = None, members: Mapping[str, tuple[str, str]] = MEMBERS) -> Path:
    """A family around it in ``folder``: full modules are the base moved a little, adapters are of chance."""
    model = base(LlamaConfig(**SHAPE) if config is None else config)
    model.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(EMBEDDED_BASE).save_pretrained(folder / "base")
    place = folder / "fam"
    init_family(place, folder / "base")
    for seed, (member, (sharing, tuner)) in enumerate(members.items(), start=1):
        path = f"modules/{member}.own"
        _tune(place, place / path, model, tuner, seed, ASKS if sharing == "icarus" else ALL)
        found = read_family(place)
        module = describe_module(
            place, f"{member}.own", path, base=None if tuner == "full" else BASE, family=found
        )
        row = SHARINGS[sharing].instantiate(module.name)
        grown = found.with_module(module)
        digests = {name: grown.module(name).digest for name in row.modules}
        write_family(place, grown.with_member(Member(member, row, sharing, digests, {})))
    return place


def _tune(
    place: Path, target: Path, model: PreTrainedModel, tuner: str, seed: int, targets: Sequence[str]
) -> None:
    chance = torch.Generator().manual_seed(seed)
    if tuner == "full":
        from copy import deepcopy

        moved = deepcopy(model)
        with torch.no_grad():
            for parameter in moved.parameters():
                if parameter.dim() > 1:
                    more = torch.randn(parameter.shape, generator=chance)
                    parameter.add_(more, alpha=0.5 * parameter.shape[1] ** -0.5)
        moved.save_pretrained(target)
        return
    inside = load_transformer(place / BASE, read_config(place / BASE), dtype=torch.float32)
    if tuner == "columns":
        paca.apply(inside, r=16, targets=targets, seed=seed)
        with torch.no_grad():
            for parameter in inside.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=chance))
        paca.save(inside, target)
        return
    add_adapter(inside, "own", r=8, alpha=16, targets=targets)
    for part in adapter_of(inside, "own").values():
        part.a.data = 0.1 * torch.randn(part.a.shape, generator=chance)
        part.b.data = 0.1 * torch.randn(part.b.shape, generator=chance)
    save_adapter(target, inside, "own", r=8, alpha=16, base="base")


PAGE = 32


def launch(place: Path, name: str, weights: str, adapters: Sequence[str] = (), **more: Any) -> Launch:
    """A worker of this family on one core: float32, small."""
    found = read_family(place)
    hosted = layout.prepared(place, found, [weights, *adapters])
    facts: dict[str, Any] = {
        "dtype": "float32",
        "page_size": PAGE,
        "max_length": 256,
        "max_running": 16,
        "cache_mib": 64,
        "cores": "nobind",
        "incarnation": "".join(filter(str.isalnum, f"{name}{os.getpid()}")),
        "folder": str(place.parent / "handed"),
        "architecture": layout.architecture(place, found, weights),
        "fit": layout.fit(place, found, dtype="float32", page_size=PAGE),
        "zero": layout.zero_adapter(place, found, weights) if adapters else "",
    }
    mine = tuple(hosted[adapter] for adapter in adapters)
    return Launch(name=name, weights=hosted[weights], adapters=mine, **{**facts, **more})


@contextmanager
def offline(*launches: Launch, log: Path) -> Iterator[list[Offline]]:
    """These workers, started at once, with heliostat of this tree."""
    environment = {"PYTHONPATH": inside(log)}
    with workers(*launches, python=python(), log=log, environment=environment) as started:
        yield started


def inside(folder: Path) -> str:
    """PYTHONPATH with which heliostat of this tree stands in vLLM's environment, with its entry points."""
    facts = folder / "site" / "heliostat-0.dist-info"
    facts.mkdir(parents=True, exist_ok=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: heliostat\nVersion: 0\n")
    (facts / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nheliostat = heliostat.vllm.plugin:register\n"
    )
    return os.pathsep.join([str(ROOT / "src"), str(facts.parent), os.environ.get("PYTHONPATH", "")])
