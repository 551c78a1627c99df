"""What one block of the model's shape costs in training: bytes kept for the backward pass, and seconds, a token.

A block with random weights is run as the module it stands for runs. Also: what a process holds that has begun to train.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heliostat.family import Row
from heliostat.linear.choice import add_columns
from heliostat.linear.lora import add_adapter, whole
from heliostat.linear.paca import settle
from heliostat.model.config import ModelConfig
from heliostat.model.seam import Causal
from heliostat.model.transformer import Block
from heliostat.ops.rope import cos_sin, inverse_frequencies
from heliostat.train.recipe import READERS_OF_KEYS, Settled
from heliostat.train.watch import resident_mib

MIB = 2**20
TOKENS = 2048
OWN = "own"
"""The name under which the member's own module is probed."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One block's cost a token: seconds and bytes kept for the backward pass."""

    seconds: float
    bytes: float


def resident_besides() -> int:
    """Bytes this process holds besides tensors; call it behind a probe, which has compiled the kernels.

    Some libraries are loaded by the first use of what needs them, and training will use it.
    """
    with torch.device("meta"):
        toy = nn.Linear(8, 8)
    toy = toy.to_empty(device="cpu")
    toy(torch.ones(8, 8)).sum().backward()
    torch.optim.AdamW(toy.parameters(), fused=True).step()
    with suppress(
        OSError, AttributeError
    ):  # a C library that keeps what is freed can say how much it is only so
        ctypes.CDLL(None).malloc_trim(0)
    return round(resident_mib() * MIB)


def probe(config: ModelConfig, recipe: Settled, row: Row, name: str) -> Probe:
    """Run one block as the module called ``name`` runs in training; per token."""
    kind = torch.bfloat16 if recipe.bf16 else torch.float32
    own, tuned = name == OWN, recipe.tuner == "full"
    block = Block(config, 0).to(torch.float32 if own and tuned else kind)
    block.requires_grad_(own and tuned)
    length = min(64, config.max_length)
    count = max(1, min(TOKENS, recipe.per_device_train_batch_size * length) // length)
    route = None
    if own and not tuned:
        targets = recipe.target_modules or READERS_OF_KEYS
        if recipe.tuner == "paca":
            add_columns(block, name, r=recipe.r or 1, targets=targets)
            if row.alone:
                settle(block, name)
        else:
            add_adapter(block, name, r=recipe.r or 1, alpha=1.0, targets=targets)
        route = whole(name)
    # Behind a tuned writer the frozen speaker is on the tape: its input carries no gradient, its keys and values do.
    taped = own or (name in row.modules and row.prompt_writer == OWN)
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
    tokens = count * length
    return Probe(_seconds(once) / tokens, (kept if taped else 0) / tokens)


def _seconds(once: Callable[[], None]) -> float:
    """Mean time of three runs behind one that warms up."""
    once()
    begin = time.perf_counter()
    for _ in range(3):
        once()
    return (time.perf_counter() - begin) / 3


def _kept_bytes(run: Callable[[], None], block: Block) -> int:
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
