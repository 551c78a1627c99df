"""Columns on models of transformers: put on, trained by their Trainer, lifted, merged, saved; PEFT reads them."""

import copy
import math
import re
import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from heliostat.errors import Refused
from heliostat.linear import paca
from heliostat.linear.lora import AdaptedLinear
from tests.unit.linear.test_columns import kept

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding_layers`"
)
PAGE = Path(__file__).parents[3] / "docs" / "methods" / "paca.md"
IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))


def theirs(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def train(model: Any, steps: int = 4, *, seed: int = 0, **options: Any) -> None:
    """A few steps on random tokens."""
    chance = torch.Generator().manual_seed(seed)
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(moving, lr=2e-2, fused=True, **options)
    for _ in range(steps):
        ids = torch.randint(3, 250, (2, 9), generator=chance)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_resident_and_delta_form_learn_the_same(tiny_base: Path) -> None:
    found = []
    for form in ("resident", "delta"):
        model = theirs(tiny_base)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        paths = paca.apply(model, r=6, form=form)
        assert len(paths) == 14
        train(model)
        found.append(logits(model))
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {f"{path}.adapters.default.delta" for path in paths}
        for name, parameter in model.named_parameters():
            if ".adapters." not in name and form == "delta":
                assert torch.equal(parameter, before[name.replace(".inner.", ".")])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-4)
    assert (found[0] - logits(theirs(tiny_base))).abs().max() > 0.01


def test_train_eval_save_load_lift_wear_and_merge_are_one_function(tiny_base: Path, tmp_path: Path) -> None:
    model = theirs(tiny_base)
    base = logits(model)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    paca.apply(model, r=6)
    train(model)
    paca.save(model, tmp_path / "now")  # before anything is run again
    merged = paca.merge(copy.deepcopy(model))
    want = logits(model.eval())
    assert torch.equal(logits(merged), want)
    assert not any(isinstance(m, AdaptedLinear) for m in merged.modules())
    train(model.train(), 1)
    assert not torch.equal(logits(model), want)
    fresh = theirs(tiny_base)
    paca.load(fresh, tmp_path / "now")
    for form in ("resident", "delta", "resident"):
        paca.wear(fresh, "default", form=form)
        torch.testing.assert_close(logits(fresh), want, rtol=0, atol=1e-5)
    paca.wear(fresh, None)
    assert torch.equal(logits(fresh), base)
    for name, parameter in fresh.named_parameters():
        if ".adapters." not in name:
            assert torch.equal(parameter, weights[name.replace(".inner.", ".")])
    paca.wear(fresh, "default", form="delta")
    torch.testing.assert_close(logits(paca.merge(fresh)), want, rtol=0, atol=1e-5)


def test_a_run_goes_on_from_what_was_saved(tiny_base: Path, tmp_path: Path) -> None:
    model = theirs(tiny_base)
    paca.apply(model, r=4)
    train(model, 2)
    paca.save(model, tmp_path)
    again = theirs(tiny_base)
    paca.load(again, tmp_path)
    train(model, 2, seed=1)
    train(again, 2, seed=1)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


def test_several_on_one_model_each_its_own(tiny_base: Path) -> None:
    model = theirs(tiny_base)
    found = {}
    for seed, name in enumerate(("one", "two")):
        paca.apply(model, r=4, name=name, seed=seed)
        train(model, seed=seed)
        found[name] = logits(model)
    assert not torch.equal(found["one"], found["two"])
    for name in ("one", "two", "one"):
        paca.wear(model, name)
        torch.testing.assert_close(logits(model), found[name], rtol=0, atol=1e-5)


def test_put_on_again_begins_from_the_base(tiny_base: Path, tmp_path: Path) -> None:
    model = theirs(tiny_base)
    base = logits(model)
    paca.apply(model, r=4)
    train(model)
    tuned = logits(model)
    paca.save(model, tmp_path)
    paca.load(model, tmp_path)  # over the columns that are in the weights
    torch.testing.assert_close(logits(model), tuned, rtol=0, atol=1e-5)
    paca.wear(model, None)
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-5)
    again = theirs(tiny_base)
    paca.apply(again, r=4)
    train(again)
    paca.apply(again, r=4, seed=1)
    torch.testing.assert_close(logits(again), base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("small", [False, True])
def test_saved_without_loss_and_read_back(small: bool, tiny_base: Path, tmp_path: Path) -> None:
    model = theirs(tiny_base)
    paca.apply(model, r=5)
    train(model)
    paca.save(model, tmp_path, small=small)
    again = theirs(tiny_base)
    assert paca.load(again, tmp_path) == sorted(paca.columns_of(model))
    for path, part in paca.columns_of(again).items():
        there = paca.columns_of(model)[path]
        assert torch.equal(part.delta, there.delta) and torch.equal(part.columns, there.columns)
        assert part.delta.requires_grad
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert all(("paca_" in name) == small for name in names) and len(names) == 28


def test_peft_reads_what_we_save(tiny_base: Path, tmp_path: Path) -> None:
    model = theirs(tiny_base)
    paca.apply(model, r=5)
    train(model)
    paca.save(model, tmp_path)
    peft = PeftModel.from_pretrained(theirs(tiny_base), str(tmp_path)).eval()
    torch.testing.assert_close(logits(peft), logits(model), rtol=0, atol=1e-5)


def test_a_low_rank_adapter_is_no_choice_of_columns(tiny_base: Path, tmp_path: Path) -> None:
    peft = get_peft_model(
        theirs(tiny_base), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    )
    peft.save_pretrained(str(tmp_path))
    with pytest.raises(Refused, match=r"q_proj is low-rank"):
        paca.load(theirs(tiny_base), tmp_path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_own_trainer_trains_and_resumes(
    checkpointing: bool, tiny_base: Path, tmp_path: Path
) -> None:
    data = [{"input_ids": row, "labels": row} for row in IDS]

    def run(steps: int, *, resume: bool) -> Any:
        model = theirs(tiny_base)
        paca.apply(model, r=4)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            gradient_checkpointing=checkpointing,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return model

    whole = run(4, resume=False)
    resumed = run(4, resume=True)
    torch.testing.assert_close(logits(resumed), logits(whole), rtol=0, atol=1e-5)
    assert (logits(whole) - logits(theirs(tiny_base))).abs().max() > 0.01


def test_what_was_written_past_torch_stands_in_the_weights_after_a_refresh(tiny_base: Path) -> None:
    model = theirs(tiny_base)
    paca.apply(model, r=4)
    before = logits(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    paca.refresh(model)
    written = logits(model)
    paca.wear(model, None)
    torch.testing.assert_close(logits(model), before)
    paca.wear(model, "default")
    assert (written - before).abs().max() > 0.01
    torch.testing.assert_close(logits(model), written)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
@pytest.mark.parametrize("block", [0, 1], ids=["alone", "in a row"])
def test_the_example_of_the_page_runs(
    block: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    data = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(output_dir="out", max_steps=2, report_to=[], save_strategy="no")
    names: dict[str, Any] = {
        "model": theirs(tiny_base),
        "data": data,
        "Trainer": Trainer,
        "arguments": arguments,
    }
    (tmp_path / "example.py").write_text(blocks[block], encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "example.py"), init_globals=names)
    if block == 0:
        assert type(names["model"].model.layers[0].mlp.up_proj) is nn.Linear
        peft = PeftModel.from_pretrained(theirs(tiny_base), "adapter").eval()
        torch.testing.assert_close(logits(peft), logits(names["model"].eval()), rtol=0, atol=1e-4)


def test_less_is_kept_than_by_a_low_rank_adapter_of_as_many_parameters(tiny_base: Path) -> None:
    def run(model: Any) -> Tensor:
        logits: Tensor = model(IDS).logits
        return logits

    sizes = {}
    makers: dict[str, Callable[[Any], Any]] = {
        "lora": lambda m: get_peft_model(m, LoraConfig(r=2, target_modules="all-linear")),
        "paca": lambda m: (paca.apply(m, r=4), m)[1],
    }
    for name, make in makers.items():
        model = make(theirs(tiny_base))
        known = [*model.parameters(), *model.buffers()]
        sizes[name] = sum(math.prod(shape) for shape in kept(partial(run, model), known))
    assert sizes["paca"] < 0.84 * sizes["lora"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own doing
def test_a_compiled_model_sees_every_step(tiny_base: Path) -> None:
    plain, compiled = (theirs(tiny_base) for _ in range(2))
    for model in (plain, compiled):
        paca.apply(model, r=4, targets="q_proj,k_proj,down_proj")
    train(plain)
    train(torch.compile(compiled, backend="aot_eager"))
    torch.testing.assert_close(logits(compiled), logits(plain), rtol=0, atol=1e-4)


def test_refusals(tiny_base: Path) -> None:
    model = theirs(tiny_base)
    with pytest.raises(Refused, match=r"targets q_prj: this model has down_proj, gate_proj, k_proj"):
        paca.apply(model, r=4, targets=["q_prj"])
    with pytest.raises(Refused, match="r is 33.*32 inputs"):
        paca.apply(model, r=33)
    with pytest.raises(Refused, match=r"lm_head is tied: its weight is also model\.embed_tokens\.weight"):
        paca.apply(model, r=4, targets=["lm_head"])
    with pytest.raises(Refused, match="no columns called 'default'"):
        paca.save(theirs(tiny_base), "nowhere")
    with pytest.raises(Refused, match="this model has no Linear"):
        paca.apply(nn.Sequential(nn.ReLU()), r=4, targets="x")
