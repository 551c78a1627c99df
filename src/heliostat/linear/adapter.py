"""Adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors, both directions, lossless.

Low-rank ones are PEFT's LORA. Tuned columns are its PACA (PEFT from 0.22 on), small; and they are a LoRA without loss,
whose A selects the columns: that is what every PEFT and vLLM read (``columns_as_lora``), and it is read back as columns.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.errors import Refused
from heliostat.files import atomic_write_text, read_json
from heliostat.linear.choice import put_columns
from heliostat.linear.columns import is_dense
from heliostat.linear.lora import adapter_of, like_weight, put_adapter
from heliostat.model.weights import PICKLES, digest_folder, read_shapes, read_tensors, save_tensors
from heliostat.ops.native.blocks import LINEARS

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TENSOR = {
    "LORA": re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight"),
    "PACA": re.compile(r"base_model\.model\.(?P<path>.+)\.paca_(?P<part>delta|indices)"),
}
PARTS = {"LORA": ("A", "B"), "PACA": ("delta", "indices")}
# Options of PEFT's LoRA that change nothing when the adapter runs, or that its tensors show by themselves.
HARMLESS = frozenset(
    """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config
    r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern init_lora_weights target_modules exclude_modules
    layers_to_transform layers_pattern megatron_core qalora_group_size ensure_weight_tying velora_config
    loftq_config eva_config corda_config lora_ga_config
    """.split()  # noqa: SIM905 - a list of forty lines hides what it says
)
HARMLESS_COLUMNS = frozenset(
    """
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config
    r paca_alpha target_modules exclude_modules layers_to_transform layers_pattern random_seed init_weights
    """.split()  # noqa: SIM905
)
# How an adapter began matters only where that took something away from the base's weights.
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter in PEFT's format."""
    return (Path(folder) / CONFIG).is_file()


def adapter_facts(folder: Path) -> dict[str, Any]:
    """What of adapter_config.json decides the function; refuses, by name, what we do not run."""
    config = read_json(Path(folder) / CONFIG)
    kind = config.get("peft_type")
    if kind not in TENSOR:
        raise Refused(f"{folder}: peft_type {kind!r}; heliostat reads 'LORA' and 'PACA'")
    if not isinstance(r := config.get("r", 8), int) or r < 1:
        raise Refused(f"{folder}: r must be a positive whole number, it is {r!r}")
    return _column_facts(folder, config, r) if kind == "PACA" else _low_rank_facts(folder, config)


def _column_facts(folder: Path, config: Mapping[str, Any], r: int) -> dict[str, Any]:
    for option, value in config.items():
        if option not in HARMLESS_COLUMNS and value not in (None, False, [], {}):
            raise Refused(f"{folder}: {option} {value!r} is not supported: heliostat runs plain PaCA")
    return {"peft_type": "PACA", "scale": _number(folder, config, "paca_alpha") / r}


def _number(folder: Path, config: Mapping[str, Any], key: str) -> float:
    value = 8 if config.get(key) is None else config[key]
    if not isinstance(value, (int, float)):
        raise Refused(f"{folder}: {key} must be a number, it is {value!r}")
    return float(value)  # 16 and 16.0 are one adapter, so one digest


def _low_rank_facts(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    for option, value in config.items():
        if option not in HARMLESS and value not in (None, False, "none", [], {}):
            raise Refused(f"{folder}: {option} {value!r} is not supported: heliostat runs plain LoRA")
    if (start := config.get("init_lora_weights")) not in KEEPS_BASE:
        raise Refused(
            f"{folder}: init_lora_weights {start!r} changes the base's weights too; convert the adapter to a plain one "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    alpha = _number(folder, config, "lora_alpha")
    try:
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            re.compile(pattern), float(value)
    except (re.error, AttributeError, TypeError, ValueError) as error:
        raise Refused(f"{folder}: alpha_pattern must map patterns to numbers: {error}") from error
    keys = ("r", "use_rslora", "rank_pattern", "alpha_pattern")
    facts = {key: config[key] for key in keys if config.get(key)}
    return facts | {"lora_alpha": alpha}


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
    columns: dict[str, tuple[Tensor, Tensor]] = {}
    for path, part in read_adapter(folder).items():
        linear = linear_at(model, path, folder)
        part.refuse_other_shape(folder, path, linear)
        if part.columns is not None:
            columns[path] = part.columns, part.b * part.scale
            continue
        assert part.a is not None
        adapter = put_adapter(model, path, name, r=part.b.shape[1], scale=part.scale)
        adapter.to(_kind(model, linear))
        adapter.a.data.copy_(part.a)
        adapter.b.data.copy_(part.b)
        adapter.requires_grad_(False)
    placed = put_columns(model, name, {path: chosen for path, (chosen, _) in columns.items()})
    for path, tuned in placed.items():
        linear = linear_at(model, path, folder)
        tuned.delta.data = columns[path][1].to(like_weight(linear).device, _kind(model, linear))
        tuned.requires_grad_(False)


def _kind(model: nn.Module, linear: nn.Linear) -> torch.dtype:
    """Number format of an adapter on ``linear``: the weight's, or the model's where there is no plain weight."""
    return linear.weight.dtype if is_dense(linear) else next(model.parameters()).dtype


@dataclass(frozen=True, slots=True)
class Saved:
    """One Linear's part of an adapter as it is on disk: scale * B A, where A [r, in] may select columns."""

    b: Tensor  # [out, r]
    scale: float
    a: Tensor | None = None
    columns: Tensor | None = None  # [r] int64: which columns A selects, if it does

    def refuse_other_shape(self, folder: Path, path: str, linear: nn.Linear) -> None:
        """Refuse a part that was made for another Linear."""
        outputs, inputs, r = linear.out_features, linear.in_features, self.b.shape[-1]
        there = f"the base's Linear is {inputs} -> {outputs}"
        if self.a is not None and (self.a.shape != (r, inputs) or self.b.shape != (outputs, r)):
            shapes = f"{tuple(self.a.shape)}, {tuple(self.b.shape)}"
            raise Refused(f"{folder}: {path} has A, B of {shapes}; {there}")
        if self.columns is None:
            return
        if self.b.shape != (outputs, self.columns.numel()):
            raise Refused(f"{folder}: {path} has columns of {tuple(self.b.shape)}; {there}")
        chosen = self.columns.tolist()
        if len(set(chosen)) != len(chosen) or not all(0 <= column < inputs for column in chosen):
            raise Refused(f"{folder}: {path} tunes columns twice, or others than 0 to {inputs - 1}")


def read_adapter(folder: Path) -> dict[str, Saved]:
    """All parts of the adapter in ``folder``, by the path of their Linear, sorted."""
    facts = adapter_facts(folder)
    if "peft_type" in facts:
        pairs = _tensors(folder, "PACA")
        return {
            path: Saved(pair["delta"], facts["scale"], columns=_whole_numbers(folder, path, pair["indices"]))
            for path, pair in pairs.items()
        }
    found = {}
    for path, pair in _tensors(folder, "LORA").items():
        scale = _scale(facts, path, pair["A"].shape[0])
        found[path] = Saved(pair["B"], scale, pair["A"], selected(pair["A"]))
    return found


def selected(a: Tensor) -> Tensor | None:
    """The columns [r] (int64, each another) that A [r, in] picks out of its input; None where it does anything else."""
    if a.dim() != 2 or not a.numel() or a.shape[0] > a.shape[1]:
        return None
    picked = a.argmax(1)
    ones = torch.zeros_like(a).scatter_(1, picked[:, None], 1)
    return picked if torch.equal(a, ones) and picked.unique().numel() == picked.numel() else None


def _whole_numbers(folder: Path, path: str, indices: Tensor) -> Tensor:
    if indices.dim() != 1 or indices.is_floating_point():
        raise Refused(
            f"{folder}: {path} has columns {tuple(indices.shape)} of {indices.dtype}, not whole numbers"
        )
    return indices.long()


def save_adapter(folder: Path, model: nn.Module, name: str, *, r: int, alpha: float, base: str) -> None:
    """Write the adapter called ``name`` as PEFT would; ``base`` is what the card of the adapter calls its base."""
    parts = adapter_of(model, name)
    tensors: dict[str, Tensor] = {}
    for path, part in parts.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = part.a.detach()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = part.b.detach()
    _write(folder, tensors, {"base_model_name_or_path": base, "r": r, "lora_alpha": alpha, **LOW_RANK})


def save_columns(folder: Path, columns: Mapping[str, tuple[Tensor, Tensor]], *, base: str) -> None:
    """Write tuned columns, (D [out, r], which [r]) by path, as PEFT's PaCA: nothing but what was tuned."""
    tensors: dict[str, Tensor] = {}
    for path, (delta, chosen) in columns.items():
        tensors[f"{PREFIX}{path}.paca_delta"] = delta.detach()
        tensors[f"{PREFIX}{path}.paca_indices"] = chosen
    r = max(chosen.numel() for _, chosen in columns.values())
    facts = {
        "peft_type": "PACA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "paca_alpha": r,
    }
    _write(folder, tensors, facts | {"modules_to_save": None, "inference_mode": True})


def save_as_lora(
    folder: Path, columns: Mapping[str, tuple[Tensor, Tensor]], inputs: Mapping[str, int], *, base: str
) -> None:
    """The same columns as a LoRA in PEFT's format, without loss: B holds D, A [r, in] selects the columns.

    ``inputs``: width of each Linear's input, by path.
    """
    tensors: dict[str, Tensor] = {}
    for path, (delta, chosen) in columns.items():
        select = torch.zeros(chosen.numel(), inputs[path], dtype=delta.dtype)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = select.scatter_(1, chosen.cpu()[:, None], 1)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = delta.detach()
    ranks = {path: chosen.numel() for path, (_, chosen) in columns.items()}
    r = max(ranks.values())
    other = {re.escape(path): rank for path, rank in ranks.items() if rank != r}
    patterns = {"rank_pattern": other, "alpha_pattern": other} if other else {}
    facts = {"base_model_name_or_path": base, "r": r, "lora_alpha": r, **LOW_RANK, **patterns}
    _write(folder, tensors, facts)


def columns_as_lora(source: Path, target: Path, inputs: Mapping[str, int]) -> None:
    """A folder of tuned columns as a LoRA, for whoever reads only that (PEFT before 0.22, vLLM)."""
    saved = read_adapter(source)
    columns = {
        path: (part.b * part.scale, part.columns) for path, part in saved.items() if part.columns is not None
    }
    assert len(columns) == len(saved), f"{source} holds more than columns"
    base = read_json(source / CONFIG).get("base_model_name_or_path") or ""
    save_as_lora(target, columns, inputs, base=str(base))


def is_columns(folder: Path) -> bool:
    """Whether the adapter in ``folder`` is one of tuned columns, in its small format."""
    return read_json(Path(folder) / CONFIG).get("peft_type") == "PACA"


LOW_RANK = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "lora_dropout": 0.0,
    "bias": "none",
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "inference_mode": True,
}


def _write(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / WEIGHTS)
    pattern = TENSOR[facts["peft_type"]]
    paths = [match["path"] for name in tensors if (match := pattern.fullmatch(name))]
    config = {**facts, "target_modules": sorted({path.rsplit(".", 1)[-1] for path in paths})}
    atomic_write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def digest_adapter(folder: Path, base_digest: str, *, fresh: bool = False) -> str:
    """Digest of an adapter: its tensors, its scaling and the weights it rides on (K,V depend on all three)."""
    facts = {"adapter": adapter_facts(folder), "base": base_digest}
    return digest_folder(folder, [adapter_file(folder)], facts, fresh=fresh)


def adapter_parameters(folder: Path) -> int:
    """Number of parameters of an adapter on disk; which columns are tuned is none."""
    found = read_adapter(folder).values()
    return sum(part.b.numel() + (part.a.numel() if part.a is not None else 0) for part in found)


def adapter_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes that an adapter takes in memory at most; only the heads of its file are read."""
    widths = {True: torch.int64.itemsize, False: dtype.itemsize}
    shapes = read_shapes([adapter_file(folder)])
    return sum(math.prod(shape) * widths[name.endswith(".paca_indices")] for name, shape in shapes)


def _tensors(folder: Path, kind: str) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors([adapter_file(folder)]):
        match = TENSOR[kind].fullmatch(name)
        if match is None:
            raise Refused(
                f"{folder}: the tensor {name!r} is no part of a {kind} adapter as heliostat reads it"
            )
        parts.setdefault(match["path"], {})[match["part"]] = tensor
    if not parts:
        raise Refused(f"{folder} holds no adapter tensors")
    for path, pair in parts.items():
        if set(pair) != set(PARTS[kind]):
            raise Refused(f"{folder}: {path} has only {kind.lower()}_{'/'.join(sorted(pair))}")
    return dict(sorted(parts.items()))


def linear_at(model: nn.Module, path: str, folder: Path) -> nn.Linear:
    """The Linear at ``path`` itself; refused where the adapter in ``folder`` cannot sit there."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise Refused(f"{folder} adapts {path!r}, which this base has not") from error
    inner = getattr(module, "inner", module)
    if path.rpartition(".")[2] not in LINEARS and isinstance(inner, nn.Linear):
        raise Refused(f"{folder} adapts {path!r}: of a family's base only {', '.join(LINEARS)} are adapted")
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
