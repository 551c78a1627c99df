"""A larger model grown from a smaller one, with the same answers at first: for want of hours to train it from nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from heliostat.errors import Refused
from heliostat.files import atomic_directory, atomic_write_text, read_json
from heliostat.model.config import ModelConfig, config_json, read_config
from heliostat.model.weights import INDEX, read_tensors, save_checkpoint, weight_files

SPREAD = 0.02
"""Standard deviation of new weights."""
WRITERS = ("o_proj", "down_proj")
"""What adds to the residual stream: new rows and columns of theirs are zero, so that the new parts say nothing yet."""


def grow(source: Path, target: Path, *, width: int, layers: int, mlp_width: int, seed: int = 0) -> Path:
    """Write a checkpoint of the wider and deeper shape that computes what ``source`` does, up to rounding.

    Heads grow with the width.
    New channels of the residual stream are zero until somebody writes to them; new heads, new neurons and new blocks (copies
    of the one before) read, and write nothing. All of them have gradients from the first steps on. Raises Refused for
    a shape that is not larger, or an architecture other than plain Llama.
    """
    old = read_config(source)
    new = _shape(old, width, layers, mlp_width)
    draw = torch.Generator().manual_seed(seed)
    state = dict(read_tensors(weight_files(source)))
    grown = _outside(state, old, new)
    taken = -1
    for index in range(layers):
        block = index * old.layers // layers
        for name, shape in _tensors(new).items():
            tensor = state[f"model.layers.{block}.{name}"]
            silent = block == taken and any(writer in name for writer in WRITERS)
            grown[f"model.layers.{index}.{name}"] = (
                tensor.new_zeros(shape) if silent else _larger(name, tensor, shape, old, new, draw)
            )
        taken = block
    with atomic_directory(target) as partial:
        save_checkpoint(
            partial, dict(sorted(grown.items())), read_json(source / "config.json") | config_json(new)
        )
        for file in sorted(source.iterdir()):
            if file.suffix in (".json", ".jinja") and file.name not in ("config.json", INDEX):
                atomic_write_text(partial / file.name, file.read_text(encoding="utf-8"))
    return target


def _shape(old: ModelConfig, width: int, layers: int, mlp_width: int) -> ModelConfig:
    group = old.heads // old.kv_heads
    heads = width // old.head_width
    if old.architecture != "llama" or not old.tied or old.attention.gates or old.attention.sink:
        raise Refused("only plain Llama models with a tied head are grown")
    if width < old.width or layers < old.layers or mlp_width < old.mlp_width:
        raise Refused(f"{width} x {layers} blocks, {mlp_width} inside, is smaller than the source")
    if width % (old.head_width * group) or heads < old.heads:
        raise Refused(f"a width of {width} is no whole number of {group} heads of {old.head_width}")
    return replace(
        old,
        width=width,
        layers=layers,
        mlp_width=mlp_width,
        heads=heads,
        kv_heads=heads // group,
        norm_eps=old.norm_eps * old.width / width,
    )


def _tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a block's tensors, by name."""
    width, q, kv = (
        config.width,
        config.heads * config.head_width,
        config.kv_heads * config.head_width,
    )
    return {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (q, width),
        "self_attn.k_proj.weight": (kv, width),
        "self_attn.v_proj.weight": (kv, width),
        "self_attn.o_proj.weight": (width, q),
        "mlp.gate_proj.weight": (config.mlp_width, width),
        "mlp.up_proj.weight": (config.mlp_width, width),
        "mlp.down_proj.weight": (width, config.mlp_width),
    }


def _outside(state: Mapping[str, Tensor], old: ModelConfig, new: ModelConfig) -> dict[str, Tensor]:
    """Embedding and last norm: new channels are zero."""
    embedding = state["model.embed_tokens.weight"]
    wider = embedding.new_zeros(new.vocabulary, new.width)
    wider[:, : old.width] = embedding
    return {
        "model.embed_tokens.weight": wider,
        "model.norm.weight": _norm(state["model.norm.weight"], old, new),
    }


def _norm(weight: Tensor, old: ModelConfig, new: ModelConfig) -> Tensor:
    """Zeros in the new channels make the mean square smaller: the weight makes up for it."""
    wider = weight.new_ones(new.width)
    wider[: old.width] = weight
    return wider * math.sqrt(old.width / new.width)


def _larger(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    old: ModelConfig,
    new: ModelConfig,
    draw: torch.Generator,
) -> Tensor:
    if tensor.dim() == 1:
        return _norm(tensor, old, new)
    writes = any(writer in name for writer in WRITERS)
    larger = torch.zeros(shape) if writes else torch.randn(shape, generator=draw) * SPREAD
    larger[: tensor.shape[0], : tensor.shape[1]] = tensor
    return larger.to(tensor.dtype)
