"""Reads a Hugging Face config.json into the few facts our transformer needs; refuses, by name, what it cannot run.

Knows no torch. One table of readers: a new architecture of this skeleton is a new line in ``ARCHITECTURES``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.errors import Refused
from heliostat.family import choose
from heliostat.model.attention_kind import KEY, PREFIX, SOFTMAX, AttentionKind, read_kind


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a dense decoder. Letters of the house: V vocabulary, E width, L layers, H heads, K kv heads, D head width."""

    architecture: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    norm_eps: float
    tied: bool
    """Whether the output head is the embedding."""
    max_length: int
    """Longest sequence in tokens that this model runs exactly."""
    rope: Mapping[str, Any]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention: AttentionKind = SOFTMAX

    @property
    def parameters(self) -> int:
        """Number of parameters, embedding counted once when tied."""
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        attention = self.width * (2 * q + 2 * kv) + self.qkv_bias * (q + 2 * kv) + self.o_bias * self.width
        attention += 2 * self.head_width * self.qk_norm
        attention += self.heads * (self.width * self.attention.gates + self.attention.sink)
        mlp = 3 * self.width * self.mlp_width + self.mlp_bias * (2 * self.mlp_width + self.width)
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        return self.layers * (attention + mlp + 2 * self.width) + self.width + embeddings

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one position adds to the cache, all layers, keys and values."""
        return 2 * self.layers * self.kv_heads * self.head_width

    @property
    def sums_per_page(self) -> int:
        """Numbers (float32) that a page holds beside keys and values, all layers: running sums of the values."""
        return self.layers * self.kv_heads * self.head_width if self.attention.affine else 0

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each Linear of a block, by its last name."""
        q, kv, up = (
            self.heads * self.head_width,
            self.kv_heads * self.head_width,
            (self.width, self.mlp_width),
        )
        sides = {
            "q_proj": (self.width, q),
            "k_proj": (self.width, kv),
            "v_proj": (self.width, kv),
            "o_proj": (q, self.width),
        }
        return sides | {"gate_proj": up, "up_proj": up, "down_proj": up[::-1]}


def adapter_parameters(config: ModelConfig, r: int, targets: Iterable[str]) -> int:
    """Parameters of a rank-r adapter on these Linears of every block."""
    return config.layers * r * sum(sum(config.linears[name]) for name in targets)


@dataclass(frozen=True, slots=True)
class Architecture:
    """What one model_type of Hugging Face means by the options that its config does not spell out."""

    class_name: str
    qkv_bias: bool | None = False
    """None: read from ``attention_bias``."""
    o_bias: bool | None = False
    mlp_bias: bool | None = False
    qk_norm: bool = False
    window_default: int | None = None
    window_switch: bool = False
    """Whether ``use_sliding_window`` turns the window on (else the window is on when it is a number)."""
    rope_theta: float = 10000.0
    kv_heads: int | None = None
    """``num_key_value_heads`` of a config that leaves it out; None: as many as query heads."""
    head_width: int | None = None
    """``head_dim`` of a config that leaves it out; None: E / H."""
    keys: frozenset[str] = frozenset()


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "LlamaForCausalLM", None, None, None, keys=frozenset({"attention_bias", "mlp_bias", "pretraining_tp"})
    ),
    "mistral": Architecture("MistralForCausalLM", window_default=4096, kv_heads=8),
    "qwen2": Architecture("Qwen2ForCausalLM", qkv_bias=True, window_switch=True, kv_heads=32),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        None,
        None,
        qk_norm=True,
        window_switch=True,
        kv_heads=32,
        head_width=128,
        keys=frozenset({"attention_bias"}),
    ),
}

READ = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "hidden_act",
        "attention_dropout",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "layer_types",
        "model_type",
        KEY,
        "architectures",
        "quantization_config",
        "auto_map",
        "partial_rotary_factor",
    ]
)
# Keys that change nothing in a forward pass of these architectures.
HARMLESS = frozenset(
    [
        "transformers_version",
        "torch_dtype",
        "dtype",
        "initializer_range",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "cls_token_id",
        "unk_token_id",
        "output_hidden_states",
        "output_attentions",
        "return_dict",
        "use_return_dict",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "is_decoder",
        "id2label",
        "label2id",
        "problem_type",
        "finetuning_task",
        "torchscript",
        "name_or_path",
        "model_name",
        "unsloth_version",
        "unsloth_fixed",
        "tokenizer_class",
        "prefix",
        "task_specific_params",
        "bad_words_ids",
        "max_length",
        "min_length",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "num_beams",
        "rope_interleaved",
    ]
)
ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        [
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "original_max_position_embeddings",
            "truncate",
        ]
    ),
}
ROPE_NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def read_config(folder: Path) -> ModelConfig:
    """Config of the checkpoint in ``folder``. Raises Refused where a file or an option is missing or not ours."""
    path = Path(folder) / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refused(f"{folder} is no Hugging Face checkpoint: it has no config.json") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise Refused(f"{path} holds {type(data).__name__}, not a JSON object")
    return parse_config(data)


def parse_config(data: Mapping[str, Any]) -> ModelConfig:
    """The facts of a config.json, already loaded."""
    architecture = str(data.get("model_type")).removeprefix(PREFIX)
    kind = choose(architecture, ARCHITECTURES, what="architecture (model_type)")
    longest = _whole(data, "max_position_embeddings")
    attention = read_kind(data, longest)
    _refuse_foreign(data, kind)
    window = _window(data, kind)
    width, heads = _whole(data, "hidden_size"), _whole(data, "num_attention_heads")
    kv_heads = _whole(data, "num_key_value_heads", left_out=kind.kv_heads) or heads
    if heads % kv_heads:
        raise Refused(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    head_width = _whole(data, "head_dim", left_out=kind.head_width) or width // heads
    if head_width % 2:
        raise Refused(f"head_dim {head_width} is odd; rotary embedding needs an even one")
    bias = bool(data.get("attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        vocabulary=_whole(data, "vocab_size"),
        width=width,
        layers=_whole(data, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        mlp_width=_whole(data, "intermediate_size"),
        norm_eps=_number(data, "rms_norm_eps", 1e-6),
        tied=bool(data.get("tie_word_embeddings", False)),
        max_length=min(longest, window or longest),
        rope=read_rope(data, kind, longest),
        qkv_bias=bias if kind.qkv_bias is None else kind.qkv_bias,
        o_bias=bias if kind.o_bias is None else kind.o_bias,
        mlp_bias=bool(data.get("mlp_bias", False)) if kind.mlp_bias is None else kind.mlp_bias,
        qk_norm=kind.qk_norm,
        attention=attention,
    )


def read_rope(data: Mapping[str, Any], kind: Architecture, longest: int) -> dict[str, Any]:
    """Rotary options in one spelling, from ``rope_parameters`` or from ``rope_theta`` and ``rope_scaling``."""
    found: dict[str, Any] = {}
    for spelling in ("rope_scaling", "rope_parameters"):
        if not isinstance(said := data.get(spelling) or {}, dict):
            raise Refused(f"config.json: {spelling} must be an object, it is {said!r}")
        found |= said
    name = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    theta = found.pop("rope_theta", None) or _number(data, "rope_theta", kind.rope_theta)
    share = found.pop("partial_rotary_factor", None) or data.get("partial_rotary_factor") or 1.0
    if share != 1.0:
        raise Refused(f"partial_rotary_factor {share}: heliostat rotates whole heads only (1.0)")
    allowed = choose(str(name), ROPE_KEYS, what="rope type")
    unknown = sorted(set(found) - allowed - {"original_max_position_embeddings"})
    if unknown:
        raise Refused(f"rope type {name!r} has options heliostat does not know: {', '.join(unknown)}")
    missing = [key for key in ROPE_NEEDS.get(str(name), ()) if found.get(key) is None]
    if missing:
        raise Refused(f"rope type {name!r} lacks {', '.join(missing)}")
    options = {key: found[key] for key in sorted(allowed) if found.get(key) is not None}
    for key, value in {"rope_theta": theta, **options}.items():
        if not isinstance(value, (int, float)):
            raise Refused(f"rope type {name!r}: {key} must be a number, it is {value!r}")
    if "original_max_position_embeddings" in allowed:
        options.setdefault("original_max_position_embeddings", longest)
    if name == "yarn":
        options.setdefault("factor", longest / options["original_max_position_embeddings"])
    return {"rope_type": str(name), "rope_theta": float(theta), **options}


def _refuse_foreign(data: Mapping[str, Any], kind: Architecture) -> None:
    """Refuse, by name, every option that would change the result and that we do not run."""
    if data.get("quantization_config"):
        raise Refused("quantization_config: this checkpoint is quantized; start from the unquantized one")
    if data.get("auto_map"):
        warnings.warn(
            "auto_map in config.json is ignored: heliostat runs no code from checkpoints", stacklevel=3
        )
    if (act := data.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise Refused(f"hidden_act {act!r}; heliostat runs 'silu'")
    if drop := data.get("attention_dropout"):
        raise Refused(f"attention_dropout {drop}; heliostat trains without dropout (set it to 0.0)")
    if (split := data.get("pretraining_tp", 1)) not in (None, 1):
        raise Refused(f"pretraining_tp {split}; heliostat runs 1")
    unknown = [
        key
        for key, value in data.items()
        if key not in READ | HARMLESS | kind.keys
        and not key.startswith("_")
        and value not in (None, False, {}, [])
    ]
    if unknown:
        raise Refused(f"config.json has options heliostat does not know: {', '.join(sorted(unknown))}")


def _window(data: Mapping[str, Any], kind: Architecture) -> int | None:
    """Sliding window in tokens, or None. Up to the window, sliding and full attention are the same function."""
    if kind.window_switch:
        return _whole(data, "sliding_window") if data.get("use_sliding_window") else None
    if kind.window_default is None:
        return None
    return _whole(data, "sliding_window", left_out=kind.window_default)


_REQUIRED = object()


def _whole(data: Mapping[str, Any], key: str, *, left_out: Any = _REQUIRED) -> Any:
    """A positive whole number; where it may be left out, that default, and None where it says null."""
    value = data.get(key, left_out)
    if left_out is not _REQUIRED and value is None:
        return None
    if value is _REQUIRED or not isinstance(value, int) or isinstance(value, bool) or value < 1:
        shown = None if value is _REQUIRED else value
        raise Refused(f"config.json: {key} must be a positive whole number, it is {shown!r}")
    return value


def _number(data: Mapping[str, Any], key: str, left_out: float) -> float:
    value = data.get(key)
    if value is None:
        return left_out
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
        raise Refused(f"config.json: {key} must be a positive number, it is {value!r}")
    return float(value)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """config.json of a new checkpoint of this shape, as transformers reads it, or refuses it by its model_type."""
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    known, own = ARCHITECTURES[config.architecture].keys, not config.attention.plain
    return {
        "architectures": [("Heliostat" if own else "") + ARCHITECTURES[config.architecture].class_name],
        "model_type": (PREFIX if own else "") + config.architecture,
        **({KEY: config.attention.to_json()} if own else {}),
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.mlp_width,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_length,
        "rope_parameters": dict(config.rope),
        "hidden_act": "silu",
        "sliding_window": None,
        **{key: value for key, value in biases.items() if key in known},
    }
