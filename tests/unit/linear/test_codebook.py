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
from heliostat.model.seam import Causal
from heliostat.model.transformer import Transformer
from heliostat.ops.native.blocks import LINEARS
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


def tiny(*, coded: bool) -> Transformer:
    """A base of one block all of whose Linears lie in codebooks, or what those stand for."""
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    model = Transformer(parse_config({"model_type": "llama", **shape, **heads})).requires_grad_(False)
    for path, part in list(model.named_modules()):
        if path.startswith("model.layers") and isinstance(part, nn.Linear):
            made = coded_of("m2v4g16", part.out_features, part.in_features, seed=len(path))
            if coded:
                put_codebook(model, path, made)
            else:
                part.weight.data = made.dense(torch.float32)
    return model


@pytest.mark.parametrize("tuner", ["columns", "low rank"])
def test_a_member_is_tuned_on_a_base_in_codebooks_as_on_what_the_codes_stand_for(tuner: str) -> None:
    ids, where, found = torch.arange(24).view(2, 12), torch.arange(12).expand(2, 12), []
    for coded in (True, False):
        model = tiny(coded=coded)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if tuner == "columns":
            add_columns(model, "one", r=8, targets=LINEARS, seed=1)
        else:
            torch.manual_seed(1)
            add_adapter(model, "one", r=4, alpha=8, targets=LINEARS)
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer, losses = torch.optim.Adam(own, lr=0.01), []
        for _ in range(12):
            logits = model.logits(model(ids, where, Causal(), (("one", 0, None),)))
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        after = {name.replace(".inner", ""): tensor for name, tensor in model.state_dict().items()}
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "the base is frozen"
        assert len(own) == len(LINEARS) * (1 if tuner == "columns" else 2) and losses[-1] < 0.9 * losses[0]
        found.append(torch.tensor(losses))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


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
