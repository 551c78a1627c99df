"""A weight in codebooks is a Linear: adapters sit on it, a model of such Linears joins, gradients pass it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from heliostat.errors import Refused
from heliostat.linear.adapter import load_adapter, save_adapter
from heliostat.linear.choice import add_columns
from heliostat.linear.codebook import CodebookLinear, coded_linears, put_codebook
from heliostat.linear.lora import AdaptedLinear, Linear, adapter_of, add_adapter
from heliostat.model.config import parse_config
from heliostat.model.transformer import Transformer
from tests.unit.ops.test_codebook import coded_of


def test_it_takes_the_place_of_a_linear_and_keeps_the_bias() -> None:
    model = nn.Sequential(Linear(64, 8))
    model[0].requires_grad_(False)
    coded = coded_of("m1v4g32", 8, 64)
    placed = put_codebook(model, "0", coded)
    x = torch.randn(3, 64)
    torch.testing.assert_close(model(x), x @ coded.dense(torch.float32).T + placed.bias)
    assert coded_linears(model) == {"0": placed} and not placed.weight.requires_grad
    assert {"0.codes", "0.codebooks", "0.scales", "0.bias"} == set(model.state_dict())


def test_what_does_not_fit_is_refused() -> None:
    model = nn.Sequential(Linear(64, 8), nn.ReLU())
    with pytest.raises(Refused, match="64 -> 8"):
        put_codebook(model, "0", coded_of("m1v4g32", 9, 64))
    with pytest.raises(Refused, match="ReLU"):
        put_codebook(model, "1", coded_of("m1v4g32", 8, 64))


@pytest.mark.parametrize("columns", [False, True])
def test_adapters_sit_on_it_and_are_trained_through_it(columns: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": Linear(64, 32), "second": Linear(32, 4)}).requires_grad_(False)
    put_codebook(model, "first", coded_of("m1v4g32", 32, 64))
    put_codebook(model, "second", coded_of("m2v8grow", 4, 32))
    if columns:
        add_columns(model, "one", r=4, targets=["first", "second"])
    else:
        add_adapter(model, "one", r=2, alpha=4, targets=["first", "second"])
        for part in adapter_of(model, "one").values():
            nn.init.normal_(part.b)
    first, second = model["first"], model["second"]
    assert isinstance(first, AdaptedLinear) and isinstance(first.inner, CodebookLinear)
    assert isinstance(second, AdaptedLinear)
    x, route = torch.randn(5, 64), (("one", 0, None),)
    second(first(x, route), route).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == (2 if columns else 4) and all(g is not None and bool(g.any()) for g in grads)


def test_adapters_are_loaded_in_the_model_s_number_format(tmp_path: Path) -> None:
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = parse_config({"model_type": "llama", **shape, **heads})
    plain, model = Transformer(config), Transformer(config).to(torch.bfloat16)
    add_adapter(plain, "one", r=2, alpha=4, targets=["q_proj", "down_proj"])
    save_adapter(tmp_path / "adapter", plain, "one", r=2, alpha=4, base="base")
    put_codebook(model, "model.layers.0.self_attn.q_proj", coded_of("m1v4g32", 64, 64))
    load_adapter(tmp_path / "adapter", model, "one")
    parts = adapter_of(model, "one")
    assert len(parts) == 2
    assert {p.dtype for part in parts.values() for p in part.parameters()} == {torch.bfloat16}
