"""Every config.json that we accept gives the logits of transformers; every other is refused by name."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from heliostat.errors import Refused
from heliostat.model.config import ARCHITECTURES, ModelConfig, config_json, parse_config, read_config
from heliostat.model.seam import Causal
from heliostat.model.transformer import Transformer
from heliostat.model.weights import assemble, load_transformer, save_checkpoint, state_of

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
LENGTH = 24
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0},
]


def moved(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Biases, norms and everything else by chance, so that nothing passes because it is 0 or 1."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=chance))
    return model.eval()


def theirs(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    return moved(AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed)


def ours(data: dict[str, Any], model: PreTrainedModel) -> tuple[ModelConfig, Transformer]:
    config = parse_config(data)
    state = {name: tensor for name, tensor in model.state_dict().items() if "rotary" not in name}
    if config.tied:
        state.pop("lm_head.weight", None)
    built = assemble(config, state)
    wanted = {name for name, _ in built.named_parameters()}
    assert wanted == set(state), wanted ^ set(state)
    return config, built


def logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model.logits(model(ids, positions, Causal()))


def assert_same_logits(data: dict[str, Any], model: PreTrainedModel) -> ModelConfig:
    config, built = ours(data, model)
    ids = torch.randint(0, config.vocabulary, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(ids).logits
    apart = float((logits(built, ids) - want).abs().max())
    assert apart <= 1e-4, apart
    assert config.parameters == sum(p.numel() for p in model.parameters())
    return config


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """(model_type, options of its config class)."""
    kind = draw(st.sampled_from(sorted(CONFIGS)))
    heads, groups = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 2)]))
    options = {
        **SHAPE,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "rope_parameters": {
            **draw(st.sampled_from(ROPES)),
            "rope_theta": draw(st.sampled_from([500.0, 1e4, 1e6])),
        },
    }
    if kind != "qwen2":
        options["head_dim"] = draw(st.sampled_from([24 // heads, 8, 16]))
    if kind in ("llama", "qwen3"):
        options["attention_bias"] = draw(st.booleans())
    if kind == "llama":
        options["mlp_bias"] = draw(st.booleans())
    if kind == "mistral":
        options["sliding_window"] = draw(st.sampled_from([None, LENGTH, 4096]))
    return kind, options


@given(configs(), st.integers(0, 1000))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_logits_are_those_of_transformers(made: tuple[str, dict[str, Any]], seed: int) -> None:
    kind, options = made
    config = CONFIGS[kind](**{**options, "rope_parameters": dict(options["rope_parameters"])})
    data = json.loads(config.to_json_string(use_diff=False))
    assert_same_logits({**data, "model_type": kind}, theirs(config, seed))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("rope", ROPES, ids=lambda r: "-".join(str(v) for v in r.values()))
def test_the_older_spelling_of_rope_and_dtype_says_the_same(
    kind: str, rope: dict[str, Any], tmp_path: Path
) -> None:
    scaling = dict(rope)
    name = scaling.pop("rope_type")
    older: dict[str, Any] = {**SHAPE, "model_type": kind, "rope_theta": 5000.0, "torch_dtype": "float32"}
    older["rope_scaling"] = None if name == "default" else {"type": name, **scaling}
    older["hidden_act"] = "silu"
    (tmp_path / "config.json").write_text(json.dumps(older))
    model = theirs(AutoConfig.from_pretrained(tmp_path))
    config = assert_same_logits(older, model)
    newer = {k: v for k, v in older.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    newer |= {"rope_parameters": {**rope, "rope_theta": 5000.0}, "dtype": "float32"}
    assert parse_config(newer) == config


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_short_config_leaves_out_means_what_transformers_means(kind: str, tmp_path: Path) -> None:
    """Hand-written files leave out what is the default of their architecture; it is not the same for all."""
    short = {"model_type": kind, "vocab_size": 61, "hidden_size": 64, "intermediate_size": 32}
    short |= {"num_hidden_layers": 1, "num_attention_heads": 32, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(short))
    assert_same_logits(short, theirs(AutoConfig.from_pretrained(tmp_path)))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_of_transformers_loads_and_one_of_ours_loads_there(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    options = {} if kind == "qwen2" else {"head_dim": 8}
    config = CONFIGS[kind](**SHAPE, tie_word_embeddings=tied, **options)
    model = theirs(config)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    read = read_config(tmp_path / "theirs")
    loaded = load_transformer(tmp_path / "theirs", read, dtype=torch.float32)
    ids = torch.randint(0, 61, (1, LENGTH))
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded, ids), model(ids).logits, rtol=0, atol=1e-4)
    save_checkpoint(tmp_path / "ours", state_of(loaded), config_json(read))
    assert read_config(tmp_path / "ours") == read  # what we write, we read
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_we_write_of_a_shape_we_read_again(kind: str) -> None:
    for rope in ROPES:
        data = {**SHAPE, "model_type": kind, "rope_parameters": {**rope, "rope_theta": 777.0}}
        config = parse_config({**data, **({"attention_bias": True} if kind in ("llama", "qwen3") else {})})
        assert parse_config(config_json(config)) == config


def test_a_window_shortens_what_the_model_runs_exactly() -> None:
    base = {**SHAPE, "model_type": "mistral"}
    assert parse_config({**base, "sliding_window": 20}).max_length == 20
    assert parse_config({**base, "sliding_window": None}).max_length == 64
    qwen = {**SHAPE, "model_type": "qwen2", "sliding_window": 20}
    assert parse_config({**qwen, "use_sliding_window": False}).max_length == 64
    assert parse_config({**qwen, "use_sliding_window": True}).max_length == 20


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "lama"}, r"'lama' \(did you mean 'llama'\?\)"),
    ({"model_type": None}, "architecture"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ({"pretraining_tp": 2}, "pretraining_tp 2"),
    ({"logit_scale": 2.0}, "logit_scale"),
    ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ({"head_dim": 7}, "head_dim 7"),
    ({"hidden_size": "32"}, "hidden_size"),
    ({"num_hidden_layers": 0}, "num_hidden_layers"),
    ({"vocab_size": None}, "vocab_size"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
    ({"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "did you mean 'yarn'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "lacks factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks low_freq_factor, high_freq_factor"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "alpha": 1}}, "alpha"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
    ({"rope_theta": "big"}, "rope_theta"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads"),
    ({"head_dim": -8}, "head_dim"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"model_type": "mistral", "sliding_window": "wide"}, "sliding_window"),
    ({"model_type": "qwen2", "use_sliding_window": True}, "sliding_window"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_what_we_do_not_run_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        parse_config({**SHAPE, "model_type": "llama", **change})


def test_code_beside_a_checkpoint_is_ignored_with_a_warning() -> None:
    data = {**SHAPE, "model_type": "llama"}
    with pytest.warns(UserWarning, match="auto_map"):
        assert parse_config({**data, "auto_map": {"AutoModel": "x.Y"}}) == parse_config(data)


@pytest.mark.parametrize("text", ['{"model_type": ', "[1, 2]", "\xff"])
def test_a_damaged_config_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(Refused, match=r"config\.json"):
        read_config(tmp_path)
    with pytest.raises(Refused, match="no config.json"):
        read_config(tmp_path / "nowhere")


def test_the_table_of_readers_names_classes_of_transformers() -> None:
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert all(hasattr(transformers, kind.class_name) for kind in ARCHITECTURES.values())
