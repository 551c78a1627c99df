"""Which columns are tuned: drawn, longest, or most pulled; together where one input is read; refused where impossible."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from heliostat.errors import Refused
from heliostat.linear.choice import add_columns, put_columns
from heliostat.linear.lora import Linear, adapted_at, parts_of, whole
from heliostat.linear.paca import columns_of
from heliostat.model.config import read_config
from heliostat.model.seam import Causal
from heliostat.model.transformer import Transformer
from heliostat.model.weights import load_transformer

EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_base: Path) -> Transformer:
    """The toy base."""
    return load_transformer(tiny_base, read_config(tiny_base), dtype=torch.float32)


def loss_of(model: Transformer, name: str) -> Tensor:
    hidden = model(IDS, torch.arange(9).expand(2, 9), Causal(), whole(name))
    return nn.functional.cross_entropy(model.logits(hidden)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def chosen(model: Transformer, name: str) -> dict[str, list[int]]:
    return {path: part.columns.tolist() for path, part in columns_of(model, name).items()}


def test_chance_is_the_seeds_other_at_every_place_and_shared_where_one_input_is_read(
    model: Transformer,
) -> None:
    paths = add_columns(model, "a", r=8, targets=EVERY, seed=3)
    add_columns(model, "again", r=8, targets=EVERY, seed=3)
    add_columns(model, "other", r=8, targets=EVERY, seed=4)
    first = chosen(model, "a")
    assert sorted(first) == paths and len(paths) == 14
    assert first == chosen(model, "again")
    assert first != chosen(model, "other")
    block = "model.layers.{}.self_attn.{}_proj"
    assert first[block.format(0, "q")] == first[block.format(0, "k")] == first[block.format(0, "v")]
    assert first[block.format(0, "q")] != first[block.format(1, "q")]
    assert first[block.format(0, "q")] != first[block.format(0, "o")]
    for columns in first.values():
        assert columns == sorted(set(columns)) and len(columns) == 8
    parts = columns_of(model, "a")
    assert parts[block.format(0, "q")].gather is parts[block.format(0, "v")].gather
    assert parts[block.format(0, "q")].gather is not parts[block.format(1, "v")].gather


def test_which_columns_does_not_hang_on_which_other_linears_are_tuned(model: Transformer) -> None:
    add_columns(model, "one", r=4, targets=["o_proj"], seed=1)
    add_columns(model, "all", r=4, targets=EVERY, seed=1)
    assert chosen(model, "one").items() <= chosen(model, "all").items()


def test_the_longest_columns_of_all_weights_that_read_one_input(model: Transformer) -> None:
    attention = model.blocks[0].self_attn
    for weight, column in ((attention.q_proj, 5), (attention.v_proj, 9)):
        weight.weight[:, column] *= 50
    add_columns(model, "x", r=2, targets=EVERY, choice="norm")
    assert chosen(model, "x")["model.layers.0.self_attn.k_proj"] == [5, 9]


def test_the_columns_on_which_a_first_batch_pulls_most(model: Transformer) -> None:
    add_columns(model, "x", r=5, targets=EVERY, choice="gradient", loss=lambda: loss_of(model, "x"))
    got = chosen(model, "x")
    assert all(part.columns.numel() == 5 and not part.delta.any() for part in columns_of(model, "x").values())
    plain = model.requires_grad_(True)
    for path in got:
        adapted_at(model, path).adapters.clear()
    loss_of(plain, "x").backward()
    pulls: dict[str, Tensor] = {}
    for path in got:
        gradient = adapted_at(plain, path).weight.grad
        assert gradient is not None
        pulls[path] = gradient.pow(2).sum(0)
    for path, columns in got.items():
        together = [p for p in got if got[p] == columns and p.rsplit(".", 1)[0] == path.rsplit(".", 1)[0]]
        lengths = torch.stack([pulls[p] for p in together]).sum(0)
        assert sorted(lengths.topk(5).indices.tolist()) == columns


def test_refusals(model: Transformer) -> None:
    with pytest.raises(Refused, match=r"r is 33: .*q_proj has 32 inputs, so it must be from 1 to 32"):
        add_columns(model, "x", r=33, targets=["q_proj", "down_proj"])
    with pytest.raises(Refused, match="r is 0"):
        add_columns(model, "x", r=0, targets=["q_proj"])
    with pytest.raises(Refused, match="give loss"):
        add_columns(model, "x", r=2, targets=["q_proj"], choice="gradient")
    with pytest.raises(Refused, match=r"no gradient of the first batch reaches .*q_proj"):
        nothing = torch.zeros((), requires_grad=True)
        add_columns(model, "x", r=2, targets=["q_proj"], choice="gradient", loss=lambda: nothing * 1)
    assert not any(p.requires_grad for p in model.parameters())
    with torch.device("meta"):
        coded = nn.Sequential(Linear(8, 8, bias=False))
    coded[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(Refused, match="not dense: choose 'random'"):
        add_columns(coded, "x", r=2, targets=["0"], choice="norm")


def test_known_columns_share_a_gather_only_where_they_are_equal(model: Transformer) -> None:
    attention = "model.layers.0.self_attn."
    known = {f"{attention}{name}_proj": torch.tensor([1, 2]) for name in "qv"}
    put_columns(model, "x", {**known, f"{attention}k_proj": torch.tensor([1, 3])})
    parts = columns_of(model, "x")
    assert len(parts_of(model, "x")) == 3
    assert parts[f"{attention}q_proj"].gather is parts[f"{attention}v_proj"].gather
    assert parts[f"{attention}q_proj"].gather is not parts[f"{attention}k_proj"].gather
