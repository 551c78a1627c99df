"""Adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors, both directions, lossless."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from heliostat.errors import Refused
from heliostat.files import atomic_write_text, read_json
from heliostat.linear.lora import adapter_of, put_adapter
from heliostat.model.weights import PICKLES, digest_folder, read_tensors, save_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TENSOR = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
# Options of PEFT's LoRA that change nothing when the adapter runs, or that its tensors show by themselves.
HARMLESS = frozenset(
    """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config
    r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern init_lora_weights target_modules exclude_modules
    layers_to_transform layers_pattern megatron_core qalora_group_size ensure_weight_tying velora_config
    loftq_config eva_config corda_config lora_ga_config
    """.split()  # noqa: SIM905 - a list of forty lines hides what it says
)
# How an adapter began matters only where that took something away from the base's weights.
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter in PEFT's format."""
    return (Path(folder) / CONFIG).is_file()


def adapter_facts(folder: Path) -> dict[str, Any]:
    """What of adapter_config.json decides the function; refuses, by name, what we do not run."""
    config = read_json(Path(folder) / CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise Refused(f"{folder}: peft_type {kind!r}; heliostat reads 'LORA'")
    for option, value in config.items():
        if option not in HARMLESS and value not in (None, False, "none", [], {}):
            raise Refused(f"{folder}: {option} {value!r} is not supported: heliostat runs plain LoRA")
    if (start := config.get("init_lora_weights")) not in KEEPS_BASE:
        raise Refused(
            f"{folder}: init_lora_weights {start!r} changes the base's weights too; convert the adapter to a plain one "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if not isinstance(r := config.get("r"), int) or r < 1:
        raise Refused(f"{folder}: r must be a positive whole number, it is {r!r}")
    alpha = 8 if config.get("lora_alpha") is None else config["lora_alpha"]
    if not isinstance(alpha, (int, float)):
        raise Refused(f"{folder}: lora_alpha must be a number, it is {alpha!r}")
    try:
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            re.compile(pattern), float(value)
    except (re.error, AttributeError, TypeError, ValueError) as error:
        raise Refused(f"{folder}: alpha_pattern must map patterns to numbers: {error}") from error
    keys = ("r", "use_rslora", "rank_pattern", "alpha_pattern")
    facts = {key: config[key] for key in keys if config.get(key)}
    return facts | {"lora_alpha": float(alpha)}  # 16 and 16.0 are one adapter, so one digest


def adapter_file(folder: Path) -> Path:
    """The adapter's weights; a pickle is refused by name."""
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    pickles = sorted(p.name for p in folder.glob("adapter_model*") if p.suffix in PICKLES)
    if pickles:
        raise Refused(
            f"{folder / pickles[0]} is a pickle, and heliostat opens none; save the adapter as safetensors"
        )
    raise Refused(f"{folder} has no {WEIGHTS}")


def load_adapter(folder: Path, model: nn.Module, name: str) -> None:
    """Put the adapter in ``folder`` on ``model`` under ``name``. Raises Refused for paths or shapes that do not fit."""
    facts, parts = adapter_facts(folder), _tensors(folder)
    for path, pair in parts.items():
        if set(pair) != {"A", "B"}:
            raise Refused(f"{folder}: {path} has only lora_{'/'.join(sorted(pair))}")
        linear = _linear_at(model, path, folder)
        inputs, outputs = linear.in_features, linear.out_features
        r = pair["A"].shape[0]
        if pair["A"].shape != (r, inputs) or pair["B"].shape != (outputs, r):
            shapes = f"{tuple(pair['A'].shape)}, {tuple(pair['B'].shape)}"
            raise Refused(
                f"{folder}: {path} has A, B of {shapes}; the base's Linear is {inputs} -> {outputs}"
            )
        adapter = put_adapter(model, path, name, r=r, scale=_scale(facts, path, r))
        adapter.to(linear.weight.dtype)
        adapter.a.data.copy_(pair["A"])
        adapter.b.data.copy_(pair["B"])
        adapter.requires_grad_(False)


def save_adapter(folder: Path, model: nn.Module, name: str, *, r: int, alpha: float, base: str) -> None:
    """Write the adapter called ``name`` as PEFT would; ``base`` is what the card of the adapter calls its base."""
    parts = adapter_of(model, name)
    tensors: dict[str, Tensor] = {}
    for path, part in parts.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = part.a.detach()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = part.b.detach()
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({path.rsplit(".", 1)[-1] for path in parts}),
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    atomic_write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def digest_adapter(folder: Path, base_digest: str, *, fresh: bool = False) -> str:
    """Digest of an adapter: its tensors, its scaling and the weights it rides on (K,V depend on all three)."""
    facts = {"adapter": adapter_facts(folder), "base": base_digest}
    return digest_folder(folder, [adapter_file(folder)], facts, fresh=fresh)


def adapter_parameters(folder: Path) -> int:
    """Number of parameters of an adapter on disk."""
    return sum(t.numel() for pair in _tensors(folder).values() for t in pair.values())


def _tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors([adapter_file(folder)]):
        match = TENSOR.fullmatch(name)
        if match is None:
            raise Refused(f"{folder}: the tensor {name!r} is no part of a LoRA as heliostat reads it")
        parts.setdefault(match["path"], {})[match["part"]] = tensor
    if not parts:
        raise Refused(f"{folder} holds no adapter tensors")
    return dict(sorted(parts.items()))


def _linear_at(model: nn.Module, path: str, folder: Path) -> nn.Linear:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise Refused(f"{folder} adapts {path!r}, which this base has not") from error
    inner = getattr(module, "inner", module)
    if path == "lm_head":
        raise Refused(
            f"{folder} adapts 'lm_head': the head of a family is the base's, only Linears of blocks are adapted"
        )
    if not isinstance(inner, nn.Linear):
        raise Refused(f"{folder} adapts {path!r}, which is no Linear")
    return inner


def _scale(facts: Mapping[str, Any], path: str, r: int) -> float:
    alpha = _pattern(facts.get("alpha_pattern") or {}, path, facts.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(r) if facts.get("use_rslora") else r)


def _pattern(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    for key, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default
