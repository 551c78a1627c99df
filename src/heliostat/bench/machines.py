"""GPUs as their vendors describe them, and the costs of a model's shape on one: a roofline, no measurement. No torch.

A pass takes as long as the slower of two things: moving its bytes, or doing its arithmetic. How much of either a real
engine reaches is assumed (``Efficiency``), and so said wherever a number made of it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from heliostat.bench.costs import Fitted, Work
from heliostat.bench.counting import PAGE
from heliostat.bench.layout import Machine
from heliostat.errors import Refused
from heliostat.family import choose
from heliostat.model.config import ModelConfig, adapter_parameters, parse_config

NUMBER_BYTES = 2
"""Of bfloat16, in which weights and pages are reckoned."""
RANK = 16
PAGES = 4096
"""Of a worker on a machine that was measured."""
LINEARS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What an adapter is reckoned to sit on."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device; dense arithmetic, without sparsity. Bytes are decimal, as in datasheets."""

    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes a second."""
    flops: float
    """Of bfloat16 with sums in float32, a second."""
    link: float
    """Bytes a second in one direction to another device of the same machine."""


GPUS: Mapping[str, Gpu] = {
    # NVIDIA H100 Tensor Core GPU datasheet, SXM: 80 GB, 3.35 TB/s, 1,979 TFLOPS with sparsity, NVLink 900 GB/s both ways.
    "h100-80": Gpu(80e9, 3.35e12, 989e12, 450e9),
    # NVIDIA H200 Tensor Core GPU datasheet, SXM: 141 GB, 4.8 TB/s, arithmetic and NVLink as H100.
    "h200-141": Gpu(141e9, 4.8e12, 989e12, 450e9),
    # NVIDIA A100 80GB datasheet, SXM: 2,039 GB/s, 312 TFLOPS dense, NVLink 600 GB/s both ways.
    "a100-80": Gpu(80e9, 2.039e12, 312e12, 300e9),
    # NVIDIA L40S datasheet: 48 GB, 864 GB/s, 362 TFLOPS dense, PCIe 4.0 x16 (64 GB/s both ways).
    "l40s-48": Gpu(48e9, 0.864e12, 362e12, 32e9),
    # NVIDIA Ada GPU architecture paper, RTX 4090: 24 GB, 1,008 GB/s, 165 TFLOPS dense, PCIe 4.0 x16.
    "rtx4090-24": Gpu(24e9, 1.008e12, 165e12, 32e9),
}


def _llama(width: int, layers: int, heads: int, mlp: int, *, tied: bool = False) -> Mapping[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": mlp,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    }


MODELS: Mapping[str, Mapping[str, Any]] = {
    # Shapes of the Llama 3 models, as their config.json files have them.
    "1b": _llama(2048, 16, 32, 8192, tied=True),
    "3b": _llama(3072, 28, 24, 8192, tied=True),
    "8b": _llama(4096, 32, 32, 14_336),
    "70b": _llama(8192, 80, 64, 28_672),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Assumptions: what an engine reaches of a datasheet. Nobody measured them for this one on a GPU."""

    bandwidth: float = 0.7
    flops: float = 0.5
    link: float = 0.7
    memory: float = 0.9
    """Share of the memory that is there for weights and pages."""
    step_seconds: float = 0.002
    """Of scheduling and launching, for each step."""
    pass_seconds: float = 0.0005
    """More for each pass."""
    hop: float = 0.0005
    """Seconds of a message between server and worker."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """Costs of a shape on a GPU."""

    gpu: Gpu
    config: ModelConfig
    assumed: Efficiency = field(default_factory=Efficiency)

    @property
    def byte_seconds(self) -> float:
        return 1 / (self.gpu.link * self.assumed.link)

    @property
    def hop(self) -> float:
        return self.assumed.hop

    @property
    def step_bytes(self) -> int:
        """As much as comes over in the time of two steps' overhead: those who decode wait for no more at a time."""
        return int(2 * self.assumed.step_seconds / self.byte_seconds)

    def seconds(self, works: Sequence[Work]) -> float:
        """Of one step with these passes, one after the other."""
        return self.assumed.step_seconds + sum(map(self._pass, works))

    def _pass(self, work: Work) -> float:
        config, rows = self.config, work.rows + work.prompt_rows
        head = config.vocabulary * config.width
        body = config.parameters - head * (1 if config.tied else 2)
        adapter = adapter_parameters(config, RANK, LINEARS)
        position = config.kv_values_per_token * NUMBER_BYTES
        moved = (body + head * (work.sampled > 0) + adapter * work.adapters) * NUMBER_BYTES
        moved += position * (work.context + work.read + rows)
        attention = 4 * config.layers * config.heads * config.head_width
        sums = 2 * (body * rows + head * work.sampled + adapter * work.adapted_rows)
        sums += attention * (work.context + work.pairs)
        memory = moved / (self.gpu.bandwidth * self.assumed.bandwidth)
        arithmetic = sums / (self.gpu.flops * self.assumed.flops)
        return self.assumed.pass_seconds + max(memory, arithmetic)


def gpu_named(name: str) -> Gpu:
    """The GPU of that name; else refused with those that there are."""
    return choose(name, GPUS, what="GPU")


def model_named(name: str) -> ModelConfig:
    """A shape by its name."""
    return parse_config(choose(name, MODELS, what="model"))


def machine(name: str, config: ModelConfig, *, assumed: Efficiency | None = None) -> Machine:
    """A worker on one GPU of that name. Refused where not even one module fits."""
    gpu, assumed = gpu_named(name), assumed or Efficiency()
    page_bytes = PAGE * config.kv_values_per_token * NUMBER_BYTES
    weights, room = config.parameters * NUMBER_BYTES, int(gpu.memory * assumed.memory)
    if weights + page_bytes > room:
        raise Refused(
            f"a model of {config.parameters / 1e9:.1f} billion parameters takes {weights / 1e9:.0f} GB in bfloat16; "
            f"{name} has {gpu.memory / 1e9:.0f}, of which {room / 1e9:.0f} are reckoned with. One worker is one device: "
            "take a GPU with more memory, or a smaller model"
        )
    return Machine(
        name=name,
        costs=Roofline(gpu, config, assumed),
        page_bytes=page_bytes,
        weights_bytes=weights,
        adapter_bytes=adapter_parameters(config, RANK, LINEARS) * NUMBER_BYTES,
        room=room,
        max_length=config.max_length,
    )


def measured_machine(costs: Fitted, *, pages: int = PAGES) -> Machine:
    """A worker on the machine that costs were measured on. Refused where the table does not say what it is of."""
    try:
        name, page_bytes = f"{costs.about['shape']} as measured here", int(costs.about["page_bytes"])
        threads = int(costs.about["threads"])
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(
            f"the table of costs does not say of what it is ({error}); measure it with python -m heliostat.bench.steps"
        ) from error
    words = f"{name}, {threads} thread{'s' if threads != 1 else ''}"
    return Machine(name=words, costs=costs, page_bytes=page_bytes, pages=pages)


def assumptions(assumed: Efficiency | None = None) -> str:
    """What a reckoning on a GPU rests on, in one line."""
    facts = asdict(assumed or Efficiency())
    return (
        f"assumed, not measured: {facts['bandwidth']:.0%} of the datasheet's bandwidth, {facts['flops']:.0%} of its "
        f"dense bfloat16 arithmetic, {facts['link']:.0%} of its link, {facts['memory']:.0%} of its memory; "
        f"{1000 * facts['step_seconds']:g} ms a step and {1000 * facts['pass_seconds']:g} ms a pass on top; adapters of "
        f"rank {RANK}"
    )
