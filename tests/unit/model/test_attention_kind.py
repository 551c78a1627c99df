"""Kinds of attention in config.json: read, written again, refused by name; and what other programs make of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heliostat.build import init_family, module_digest, read_family
from heliostat.errors import Refused
from heliostat.files import read_json
from heliostat.model.attention_kind import NAMES, AttentionKind
from heliostat.model.config import config_json, parse_config, read_config
from heliostat.model.transformer import Transformer
from heliostat.model.weights import load_transformer, read_tensors, save_checkpoint, state_of, weight_files

SHAPE = {
    "model_type": "heliostat_llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
FIXED = {"kind": "affine", "n": "fixed", "length": 64}


@pytest.mark.parametrize(
    "own", [*({"kind": name} for name in NAMES), FIXED, {"kind": "affine", "alpha": "constant"}]
)
@pytest.mark.parametrize("model", ["heliostat_llama", "heliostat_qwen3"])
def test_what_is_read_is_written_and_counted(own: dict[str, Any], model: str) -> None:
    config = parse_config({**SHAPE, "model_type": model, "attention": own})
    assert parse_config(config_json(config)) == config
    assert sum(p.numel() for p in Transformer(config).parameters()) == config.parameters
    assert config.sums_per_page == (2 * 2 * config.head_width if "affine" in own["kind"] else 0)


def test_softmax_is_written_as_everybody_reads_it() -> None:
    plain = config_json(parse_config({**SHAPE, "attention": {"kind": "softmax"}}))
    assert plain["model_type"] == "llama" and "attention" not in plain
    assert plain["architectures"] == ["LlamaForCausalLM"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "llama", "attention": FIXED},
        r"needs a model_type that begins with 'heliostat_'.*'llama'",
    ),
    ({}, "'heliostat_llama' needs 'attention', an object"),
    ({"attention": "affine"}, "an object; it is 'affine'"),
    ({"attention": {"n": "fixed"}}, "lacks 'kind', one of softmax"),
    ({"attention": {"kind": "afine"}}, r"no attention 'afine' \(did you mean 'affine'"),
    ({"attention": {"kind": "affine", "rho": 0.9}}, "does not know: rho"),
    ({"attention": {"kind": "affine", "n": "all"}}, "n is 'all'; it is one of visible, fixed"),
    ({"attention": {"kind": "affine", "alpha": 0.5}}, "alpha is 0.5; it is one of learned, constant"),
    ({"attention": {"kind": "affine", "n": "fixed"}}, "n is 'fixed' and needs a length.* it is None"),
    ({"attention": {**FIXED, "length": "64"}}, "a positive whole number; it is '64'"),
    ({"attention": {**FIXED, "length": True}}, "it is True"),
    ({"attention": {**FIXED, "length": 0}}, "it is 0"),
    ({"attention": {**FIXED, "length": 32}}, "fixed at length 32, and max_position_embeddings is 64"),
    ({"attention": {"kind": "affine", "length": 64}}, "length is 64, and n is 'visible'"),
    ({"attention": {"kind": "sink", "n": "fixed", "length": 64}}, "'sink' has no n, length and alpha"),
    ({"attention": {"kind": "gated", "alpha": "constant"}}, "'gated' has no n, length and alpha"),
    ({"model_type": "heliostat_lama", "attention": FIXED}, r"'lama' \(did you mean 'llama'\?\)"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(c) for c, _ in REFUSED])
def test_what_is_unknown_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        parse_config({**SHAPE, **change})


@pytest.mark.parametrize("lost", ["alpha_ma", "alpha_proj.weight", "head_gate.weight", "sinks"])
def test_a_checkpoint_without_its_own_tensors_is_refused_by_name(lost: str, tmp_path: Path) -> None:
    kind = {"sinks": "sink"}.get(lost, "affine+gated")
    config = parse_config({**SHAPE, "attention": {"kind": kind}})
    state = {n: t for n, t in state_of(Transformer(config)).items() if not n.endswith(f"1.self_attn.{lost}")}
    save_checkpoint(tmp_path, state, config_json(config))
    import torch

    with pytest.raises(Refused, match=f"lacks 1 tensors, the first: model.layers.1.self_attn.{lost}"):
        load_transformer(tmp_path, config, dtype=torch.float32)
    softmax = replace(config, attention=AttentionKind())
    with pytest.raises(Refused, match="which llama as configured has not"):
        load_transformer(tmp_path, softmax, dtype=torch.float32)


def test_the_options_are_part_of_the_digest(make_checkpoint: Any, tmp_path: Path) -> None:
    base = make_checkpoint(
        model_type="heliostat_llama", attention={"kind": "affine"}, max_position_embeddings=256
    )
    digests = set()
    for name, own in {
        "a": {"kind": "affine"},
        "b": {**FIXED, "length": 256},
        "c": {**FIXED, "length": 512},
    }.items():
        state = dict(read_tensors(weight_files(base)))
        source = make_checkpoint(model_type="heliostat_llama", attention=own)
        save_checkpoint(source, state, {**read_json(source / "config.json")})
        init_family(tmp_path / name, source)
        digests.add(module_digest(tmp_path / name, read_family(tmp_path / name), "base"))
    assert len(digests) == 3


@pytest.mark.parametrize("kind", ["affine", "sink", "gated"])
def test_transformers_refuses_it_by_name(kind: str, make_checkpoint: Any) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make_checkpoint(model_type="heliostat_llama", attention={"kind": kind})
    assert read_config(folder).attention.name == kind
    with pytest.raises((ValueError, KeyError), match="heliostat_llama"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
