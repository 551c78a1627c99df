"""What a run will need, said before anything is loaded: parameters, memory, time.

The family's config and the data are read; one block of the model's shape, with random weights, is run once to see
what it keeps for the backward pass and how long it takes. Everything else is counting.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heliostat.build import BASE, best_dtype, config_of, load_tokenizer, read_family
from heliostat.errors import Refused
from heliostat.family import SHARINGS, Row
from heliostat.files import readable_size
from heliostat.linear.lora import add_adapter, whole
from heliostat.model.config import ModelConfig, adapter_parameters
from heliostat.model.seam import Causal
from heliostat.model.transformer import Block
from heliostat.ops.rope import cos_sin, inverse_frequencies
from heliostat.train.data import Batches, Example
from heliostat.train.recipe import READERS_OF_KEYS, Recipe, Settled
from heliostat.train.sharing import lay_out
from heliostat.train.tune import judged, learned
from heliostat.train.watch import resident_mib

MIB = 2**20
PROBE_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Forecast:
    """The numbers of a dry run. Bytes, seconds, counts."""

    trainable: int
    frozen: int
    """Parameters that are loaded and do not move."""
    examples: int
    answer_tokens: int
    steps: int
    tokens_per_step: Mapping[str, float]
    """Tokens each module runs in a mean step, padding included."""
    weights: int
    optimizer: int
    """Gradients and AdamW's two moments."""
    activations: int
    process: int
    """What Python and its libraries hold before anything is loaded."""
    seconds_per_step: float

    @property
    def memory(self) -> int:
        """Resident memory at the peak, bytes."""
        return self.weights + self.optimizer + self.activations + self.process

    def rows(self) -> list[tuple[str, str]]:
        """The forecast as lines of a table."""
        tokens = ", ".join(f"{name} {count:,.0f}" for name, count in self.tokens_per_step.items())
        return [
            (
                "trainable parameters",
                f"{self.trainable:,} ({self.trainable / (self.trainable + self.frozen):.1%} of what is loaded)",
            ),
            ("frozen parameters", f"{self.frozen:,}"),
            ("examples, answer tokens", f"{self.examples:,}, {self.answer_tokens:,}"),
            ("optimizer steps", f"{self.steps:,}"),
            ("tokens a step, by module", tokens),
            ("memory", readable_size(self.memory)),
            ("  weights", readable_size(self.weights)),
            ("  gradients and optimizer", readable_size(self.optimizer)),
            ("  activations", readable_size(self.activations)),
            ("  Python and libraries", readable_size(self.process)),
            (
                "time",
                f"about {_duration(self.steps * self.seconds_per_step)} ({self.seconds_per_step:.2f} s a step)",
            ),
        ]

    def to_json(self) -> dict[str, Any]:
        """All numbers, the sums included."""
        return asdict(self) | {"memory": self.memory, "seconds": self.steps * self.seconds_per_step}


@dataclass(frozen=True, slots=True)
class Probe:
    """One block's cost a token: seconds and bytes kept for the backward pass."""

    seconds: float
    bytes: float


def forecast(recipe: Recipe) -> Forecast:
    """Numbers for a recipe on this machine. Raises Refused for what the run itself would refuse in recipe or data."""
    folder = Path(recipe.family)
    family = read_family(folder)
    family.free_name(recipe.member, folder=recipe.family)
    if recipe.teacher is not None:
        raise Refused(
            "--dry-run counts the answers' tokens, and a teacher's answers are not known before the run"
        )
    config, tokenizer = config_of(folder, family), load_tokenizer(folder, family)
    settled = recipe.resolve(bf16=best_dtype() is torch.bfloat16, hidden_size=config.width)
    settled.check_targets(config.linears)
    settled = settled.model_copy(update={"max_length": min(settled.max_length, config.max_length)})
    row = SHARINGS[settled.sharing].instantiate("own")
    data = learned(settled, tokenizer, row, teacher=None)
    judged(settled, tokenizer)
    examples = data.examples
    mean, worst = _tokens(examples, settled, row)
    trainable, own_weights = _own(config, settled)
    probes = {name: _probe(config, settled, row, name) for name in worst}
    frozen = config.parameters if BASE in row.modules or settled.tuner == "lora" else 0
    frozen += config.parameters - trainable if settled.tuner == "full" else 0
    size = 2 if settled.bf16 else 4
    head = _head_bytes(config, examples, settled)
    steps_per_epoch = -(-len(examples) // settled.batch_size)
    return Forecast(
        trainable=trainable,
        frozen=frozen,
        examples=len(examples),
        answer_tokens=data.answer_tokens,
        steps=settled.total_steps(steps_per_epoch),
        tokens_per_step={name: count * settled.gradient_accumulation_steps for name, count in mean.items()},
        weights=own_weights
        + (config.parameters * size if BASE in row.modules or settled.tuner == "lora" else 0),
        optimizer=trainable * 12,
        activations=head + round(sum(probes[n].bytes * config.layers * count for n, count in worst.items())),
        process=round(resident_mib() * MIB),
        seconds_per_step=settled.gradient_accumulation_steps
        * sum(probes[n].seconds * config.layers * count for n, count in mean.items()),
    )


def _own(config: ModelConfig, recipe: Settled) -> tuple[int, int]:
    """Parameters that are trained, and bytes of the member's own weights (with their copies in bfloat16)."""
    if recipe.tuner == "lora":
        trained = adapter_parameters(config, recipe.r or 0, recipe.target_modules or ())
        return trained, trained * 4
    trained = config.parameters
    if SHARINGS[recipe.sharing].targets == "query_side":
        sides = [config.linears[name] for name in ("k_proj", "v_proj")]
        per_layer = sum(a * b + b * config.qkv_bias for a, b in sides)
        trained -= config.layers * (per_layer + config.head_width * config.qk_norm)
    return trained, config.parameters * (6 if recipe.bf16 else 4)


def _tokens(
    examples: Sequence[Example], recipe: Settled, row: Row
) -> tuple[dict[str, float], dict[str, int]]:
    """Padded tokens that each module runs in a micro-batch: mean and most."""
    batches = Batches(examples, batch_size=recipe.per_device_train_batch_size, seed=recipe.seed)
    layouts = [lay_out(batches.at(step), row) for step in range(min(batches.steps_per_epoch, 64))]
    counts: dict[str, list[int]] = {}
    for layout in layouts:
        counts.setdefault(row.prompt_writer, []).append(layout.prompt.numel())
        if layout.answers is not None:
            for name in dict.fromkeys(n for n in (row.answer_writer, row.speaker) if n != row.prompt_writer):
                counts.setdefault(name, []).append(layout.answers.ids.numel())
    return {n: sum(c) / len(layouts) for n, c in counts.items()}, {n: max(c) for n, c in counts.items()}


def _head_bytes(config: ModelConfig, examples: Sequence[Example], recipe: Settled) -> int:
    """Logits, their log-softmax and its gradient, float32, for the answer tokens of a large micro-batch."""
    longest = sorted((sum(b - a for a, b in e.answers) for e in examples), reverse=True)
    return 3 * 4 * config.vocabulary * sum(longest[: recipe.per_device_train_batch_size])


def _probe(config: ModelConfig, recipe: Settled, row: Row, name: str) -> Probe:
    """Run one block as the module called ``name`` runs in training; per token."""
    kind = torch.bfloat16 if recipe.bf16 else torch.float32
    own, tuned = name == "own", recipe.tuner == "full"
    block = Block(config, 0).to(torch.float32 if own and tuned else kind)
    block.requires_grad_(own and tuned)
    length = min(64, config.max_length)
    count = max(1, min(PROBE_TOKENS, recipe.per_device_train_batch_size * length) // length)
    route = None
    if own and not tuned:
        targets = recipe.target_modules or READERS_OF_KEYS
        add_adapter(block, name, r=recipe.r or 1, alpha=1.0, targets=targets)
        route = whole(name)
    # Behind a tuned writer the frozen speaker is on the tape: its input carries no gradient, its keys and values do.
    taped = own or row.prompt_writer == "own"
    positions = torch.arange(length).expand(count, length)
    frequencies, scale = inverse_frequencies(config.rope, config.head_width)
    x = torch.randn(
        count, length, config.width, dtype=torch.float32 if own and tuned else kind, requires_grad=taped
    )
    angles = cos_sin(positions, frequencies, scale, x.dtype)

    def once() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bf16), torch.set_grad_enabled(taped):
            out = block(x, angles, Causal(), route)
        if taped:
            out.float().sum().backward()

    kept = _kept_bytes(once, block) if not recipe.gradient_checkpointing else x.numel() * x.element_size()
    once()
    begin = time.perf_counter()
    for _ in range(3):
        once()
    return Probe(
        (time.perf_counter() - begin) / 3 / (count * length), (kept if taped else 0) / (count * length)
    )


def _kept_bytes(run: Any, block: Block) -> int:
    """Bytes of distinct storages kept for the backward pass, the block's own weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
