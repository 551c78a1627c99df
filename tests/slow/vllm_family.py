"""A family of every sharing for vLLM's tests, filled by chance; the embedded engine's answers; vLLM workers to ask."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, PreTrainedModel

from heliostat.bench.trial import EMBEDDED_BASE
from heliostat.build import BASE, describe_module, init_family, read_family, write_family
from heliostat.family import SHARINGS, Member
from heliostat.linear import paca
from heliostat.linear.adapter import save_adapter
from heliostat.linear.lora import adapter_of, add_adapter
from heliostat.model.config import read_config
from heliostat.model.weights import load_transformer
from heliostat.vllm import layout
from heliostat.vllm.launch import Hosted, Launch, command

ROOT = Path(__file__).parents[2]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ASKS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = {
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


class Offline:
    """A vLLM worker of one process without a server (tests/vllm/worker.py)."""

    def __init__(self, launched: Launch, log: Path) -> None:
        self.launch, self.log = launched, log
        made = command(launched, python=python())
        words = [made.words[0], str(ROOT / "tests" / "vllm" / "worker.py"), *made.words[3:]]
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": inside(log.parent)}
        environment = {**os.environ, **made.environment, **settings}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                words,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __enter__(self) -> "Offline":
        return self

    def __exit__(self, *trouble: Any) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _heard(self, word: str) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise AssertionError(self.log.read_text()[-3000:])

    def ready(self) -> "Offline":
        """Itself, when it can be asked."""
        self._heard("READY")
        return self

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """All of them as one crowd."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(list(requests)) + "\n")
        self.process.stdin.flush()
        found: list[dict[str, Any]] = json.loads(self._heard("ANSWERS "))
        return found


@contextmanager
def offline(*launches: Launch, log: Path) -> Iterator[list[Offline]]:
    """These workers, started at once."""
    started = [Offline(one, log / f"{one.name}.log") for one in launches]
    try:
        yield [one.ready() for one in started]
    finally:
        for one in started:
            one.__exit__()


def inside(folder: Path) -> str:
    """PYTHONPATH with which heliostat of this tree stands in vLLM's environment, with its entry points."""
    facts = folder / "site" / "heliostat-0.dist-info"
    facts.mkdir(parents=True, exist_ok=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: heliostat\nVersion: 0\n")
    (facts / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nheliostat = heliostat.vllm.plugin:register\n"
    )
    return f"{ROOT / 'src'}{os.pathsep}{facts.parent}"


def model(hosted: Hosted | Launch) -> str:
    """Its name in a request."""
    return hosted.weights.model if isinstance(hosted, Launch) else hosted.model
