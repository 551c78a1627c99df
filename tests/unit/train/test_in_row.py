"""A model of transformers trained in a row: the loss that serving's row has, the right half moves, their Trainer runs it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from heliostat.build import BASE, Loaded
from heliostat.errors import Refused
from heliostat.family import SHARINGS, Row
from heliostat.linear import paca
from heliostat.model.config import read_config
from heliostat.model.weights import load_transformer
from heliostat.train import dropbp
from heliostat.train.data import Example
from heliostat.train.sharing import labelled, lay_out, log_probabilities, speak, wrap

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
READS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EXAMPLES = [Example((10, 11, 12, 20, 21, 13, 30, 31, 32), ((3, 5), (6, 9))), Example((7, 8, 9, 6), ((2, 4),))]


def theirs(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def batch() -> dict[str, torch.Tensor]:
    """EXAMPLES as transformers would have them: padded on the right, -100 where nothing is learned."""
    longest = max(len(e.ids) for e in EXAMPLES)
    labels = torch.full((len(EXAMPLES), longest), -100)
    for row, example in enumerate(EXAMPLES):
        for start, stop in example.answers:
            labels[row, start:stop] = torch.tensor(example.ids[start:stop])
    ids = torch.tensor([[*e.ids, *[0] * (longest - len(e.ids))] for e in EXAMPLES])
    mask = torch.tensor([[1] * len(e.ids) + [0] * (longest - len(e.ids)) for e in EXAMPLES])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_batches_are_read_as_examples() -> None:
    found = batch()
    assert labelled(**{"ids": found.pop("input_ids"), **found}) == EXAMPLES
    whole = torch.tensor([[5, 6, 7]])
    assert labelled(whole, None, whole) == [Example((5, 6, 7), ((1, 3),))]
    left = {"ids": whole, "attention_mask": torch.tensor([[0, 1, 1]]), "labels": whole}
    with pytest.raises(Refused, match="padded on the left"):
        labelled(**left)
    with pytest.raises(Refused, match="nothing to learn"):
        labelled(whole, None, torch.tensor([[5, -100, -100]]))
    with pytest.raises(Refused, match="no labels"):
        labelled(whole, None, None)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("tuner", ["full", "paca"])
def test_the_loss_is_the_rows_and_the_right_half_moves(sharing: str, tuner: str, tiny_base: Path) -> None:
    model = theirs(tiny_base)
    if tuner == "paca":
        paca.apply(model, r=4, targets=READS if sharing == "icarus" else "all-linear")
    wrapped = wrap(model, row=sharing)
    moving = [p for p in wrapped.parameters() if p.requires_grad]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(moving, lr=1e-2, fused=True)
    for _ in range(2):
        wrapped(**batch())["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    if tuner == "paca" and sharing != "independent":
        assert moved and all(
            name.endswith(".delta") for name in moved
        )  # bit-identical: all that others run on
    elif tuner == "full":
        assert {name for name, p in model.named_parameters() if p.requires_grad} == moved
        assert any("k_proj" in name for name in moved) == (sharing != "icarus")
    base = load_transformer(tiny_base, read_config(tiny_base), dtype=torch.float32)
    tuned = theirs(tiny_base)
    tuned.load_state_dict(paca.merge(copy.deepcopy(model)).state_dict())
    own = wrap(tuned, row="independent").modules_of_row["own"]
    row = SHARINGS[sharing].row
    modules = {"own": own, BASE: Loaded(BASE, "", BASE, base)}
    layout = lay_out(EXAMPLES, row)
    with torch.no_grad():
        want = -log_probabilities(speak(layout, row, modules), layout.targets).mean()
        torch.testing.assert_close(wrapped(**batch())["loss"], want, rtol=0, atol=1e-5)


def test_alone_it_is_what_transformers_computes(tiny_base: Path) -> None:
    model = theirs(tiny_base)
    wrapped = wrap(model, row="independent")
    want = model(**batch()).loss
    torch.testing.assert_close(wrapped(**batch())["loss"], want)
    assert torch.equal(wrapped(**batch(), num_items_in_batch=14)["loss"] * 2, wrapped(**batch())["loss"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_own_trainer_trains_it(checkpointing: bool, tiny_base: Path, tmp_path: Path) -> None:
    model = theirs(tiny_base)
    paca.apply(model, r=4)
    wrapped = wrap(model, row="sun")
    data = [{name: t[row] for name, t in batch().items()} for row in (0, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=0.02,
        gradient_checkpointing=checkpointing,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    first = wrapped(**batch())["loss"]
    Trainer(model=wrapped, args=arguments, train_dataset=data).train()
    assert wrapped(**batch())["loss"] < 0.8 * first
    assert wrapped.modules_of_row["own"].model.checkpointing == checkpointing


def test_what_a_trainer_looks_for_beside_a_module_is_the_model_s(tiny_base: Path) -> None:
    model = theirs(tiny_base)
    wrapped = wrap(model, row="sun")
    assert wrapped.generation_config is model.generation_config
    wrapped.add_model_tags(["sft"])  # as TRL's trainer does
    assert model.model_tags == ["sft"]
    with pytest.raises(AttributeError, match="no attribute 'no_such_thing'"):
        _ = wrapped.no_such_thing


def test_refusals(tiny_base: Path) -> None:
    with pytest.raises(Refused, match=r"no sharing 'son' \(did you mean 'sun'\?\)"):
        wrap(theirs(tiny_base), row="son")
    with pytest.raises(Refused, match="row names math"):
        wrap(theirs(tiny_base), row=Row("math", "base", "base", "math"))
    with pytest.raises(Refused, match="Linear is no causal LM of transformers"):
        wrap(nn.Linear(2, 2), row="sun")
    with pytest.raises(Refused, match="in a row it would drop nothing"):
        wrap(dropbp.wrap(dropped := theirs(tiny_base), rate=0.5).model, row="sun")
    assert wrap(dropbp.wrap(dropped, rate=0.5).undo(), row="sun")
    with pytest.raises(Refused, match="into a row cannot drop branches"):
        dropbp.wrap(wrap(theirs(tiny_base), row="sun"), rate=0.5)
    model = theirs(tiny_base)
    paca.apply(model, r=4)
    with pytest.raises(Refused, match=r"k_proj.*writes no keys or values"):
        wrap(model, row="icarus")
    other = theirs(tiny_base)
    other.model.more = nn.Linear(2, 2)
    with pytest.raises(Refused, match=r"has model\.more, which heliostat's transformer has not"):
        wrap(other, row="sun")
