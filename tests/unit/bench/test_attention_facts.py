"""What is told of heads is what they do: the weights written out give the attention's own output."""

import pytest
import torch

from heliostat.bench.attention_facts import SHOWN, look, weights_of
from heliostat.bench.trial_attention import KINDS
from heliostat.model.config import parse_config
from heliostat.model.seam import Causal
from heliostat.model.transformer import Transformer
from heliostat.ops.mixing import Mix
from heliostat.train.pretrain import shape_of
from heliostat.train.pretrain_recipe import PretrainRecipe

B, T, H, K, D = 2, 37, 4, 2, 8


def model_of(kind: str) -> Transformer:
    """A toy of chance whose every part of attention says something."""
    recipe = PretrainRecipe(
        output_dir="x",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        max_length=64,
        **KINDS[kind],  # type: ignore[arg-type]
    )
    torch.manual_seed(1)
    model = Transformer(parse_config(shape_of(recipe.resolve(bf16=False), 60)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("alpha_ma"):
            tensor.uniform_(0.2, 0.8)
        elif "norm" not in name and name != "frequencies":
            torch.nn.init.normal_(tensor, std=0.3)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_times_values_are_the_attention(kind: str) -> None:
    seen = []

    class Both(Causal):
        def __call__(self, layer: int, q, k, v, mix=Mix()):  # type: ignore[no-untyped-def]  # noqa: B008
            said = super().__call__(layer, q, k, v, mix)
            _, weights = weights_of(q, k, mix)
            values = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
            seen.append((said, torch.einsum("bhts,bshd->bthd", weights, values)))
            return said

    ids = torch.randint(60, (B, T), generator=torch.Generator().manual_seed(2))
    model_of(kind)(ids, torch.arange(T).expand(B, T), Both())
    assert len(seen) == 2
    for said, written_out in seen:
        torch.testing.assert_close(said, written_out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_sums_to_one_but_for_sinks_and_scaled_weights_to_the_average(kind: str) -> None:
    ids = torch.randint(60, (3, 40), generator=torch.Generator().manual_seed(3))
    found = look(model_of(kind), ids)
    mass = torch.tensor(found["heads"]["mass"])
    assert mass.shape == (2, 4) and len(found["pictures"]) == 2 and len(found["pictures"][0]) == SHOWN
    assert 0 < found["means"]["first"] < 1 and found["means"]["entropy"] > 0
    if kind == "softmax":
        torch.testing.assert_close(mass, torch.ones(2, 4))
        assert found["heads"]["first"] == found["heads"]["read"]
    if kind == "sink":
        assert (mass < 1).all()
    if kind == "affine":  # with N visible every row sums to the moving average
        average = torch.stack([b.self_attn.alpha_ma for b in model_of(kind).blocks])
        torch.testing.assert_close(mass, average, atol=1e-4, rtol=0)
