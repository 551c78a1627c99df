"""Linears run as one: the same numbers, with biases, head norms and adapters; and no byte more of weights."""

import gc
import weakref

import pytest
import torch
from torch import nn

from heliostat.linear.codebook import put_codebook
from heliostat.linear.joined import Joined
from heliostat.linear.lora import Linear, adapter_of, add_adapter, remove_adapter
from heliostat.model.config import parse_config
from heliostat.model.seam import Causal
from heliostat.model.transformer import Transformer
from tests.unit.ops.test_codebook import coded_of

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}


def model_of(kind: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(parse_config(SHAPE | {"model_type": kind}))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("inference", [False, True])
def test_a_joined_model_says_the_same(kind: str, inference: bool) -> None:
    model, ids = model_of(kind), torch.arange(18).view(2, 9)
    where = torch.arange(9).expand(2, 9)
    add_adapter(model, "one", r=2, alpha=4, targets=["q_proj", "v_proj", "up_proj", "o_proj"])
    for part in adapter_of(model, "one").values():
        nn.init.normal_(part.b)
    routes = (None, (("one", 0, None),), (("one", 0, 1), (None, 1, 2)), ((None, 0, 1), ("one", 1, 2)))
    with torch.inference_mode(inference):
        before = [model(ids, where, Causal(), route) for route in routes]
        model.join()
        after = [model(ids, where, Causal(), route) for route in routes]
    for got, want in zip(after, before, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert not torch.equal(before[0], before[1])


@pytest.mark.parametrize("leaf", ["q_proj", "up_proj", "down_proj"])
def test_a_model_with_coded_weights_joins_and_says_the_same(leaf: str) -> None:
    model, ids, where = model_of("qwen2"), torch.arange(9)[None], torch.arange(9)[None]
    for path, part in list(model.named_modules()):
        if path.endswith(leaf) and isinstance(part, nn.Linear):
            put_codebook(model, path, coded_of("m1v4g32", part.out_features, part.in_features))
    add_adapter(model, "one", r=2, alpha=4, targets=["q_proj", "up_proj"])
    for low_rank in adapter_of(model, "one").values():
        nn.init.normal_(low_rank.b)
    with torch.inference_mode():
        want = model(ids, where, Causal(), (("one", 0, None),))
        model.join()
        got = model(ids, where, Causal(), (("one", 0, None),))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_an_adapter_put_on_after_joining_acts_and_one_taken_off_does_not() -> None:
    model, ids, where = model_of("llama"), torch.arange(9)[None], torch.arange(9)[None]
    plain = model(ids, where, Causal())
    model.join()
    add_adapter(model, "late", r=2, alpha=4, targets=["k_proj", "gate_proj"])
    for part in adapter_of(model, "late").values():
        nn.init.normal_(part.b)
    assert not torch.allclose(model(ids, where, Causal(), (("late", 0, None),)), plain)
    remove_adapter(model, "late")
    torch.testing.assert_close(model(ids, where, Causal(), (("late", 0, None),)), plain, rtol=0, atol=1e-5)


def test_weights_become_views_and_joining_twice_changes_nothing() -> None:
    model = model_of("qwen2")
    names = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model.join()
    first = model.blocks[0].self_attn.joined
    model.join()
    assert model.blocks[0].self_attn.joined is first
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.numel() * 4 for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, names[name]), name


def test_a_bias_on_one_of_them_is_its_own() -> None:
    parent = nn.ModuleDict({"a": Linear(3, 2), "b": Linear(3, 4, bias=False)}).requires_grad_(False)
    x = torch.randn(5, 3)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = parent["a"], parent["b"]

    want = torch.cat((parent["a"](x), parent["b"](x)), dim=1)
    holder = Holder()
    torch.testing.assert_close(Joined(holder, ("a", "b"))(holder, x, None), want)


def test_a_joined_model_is_gone_with_its_last_holder() -> None:
    model = model_of("llama")
    model.join()
    seen, weight = weakref.ref(model), weakref.ref(model.blocks[0].self_attn.joined)
    gc.disable()  # what a circle holds would stay
    try:
        del model
        assert seen() is None and weight() is None
    finally:
        gc.enable()
