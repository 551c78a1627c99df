"""DropBP on models of transformers: the example of the page, exact passes, what is refused."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from heliostat.errors import Refused
from heliostat.train import dropbp

PAGE = Path(__file__).parents[3] / "docs" / "methods" / "dropbp.md"


def llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**{**shape, "num_attention_heads": 4, "num_key_value_heads": 2, **options})
    return LlamaForCausalLM(config)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch()).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_passes_are_exact_and_dropped_branches_learn_nothing() -> None:
    plain, model = llama(), llama()
    wrapped = dropbp.wrap(model, rate=0.5)
    assert torch.equal(plain(**batch()).logits, model(**batch()).logits)
    whole, found = gradients(plain), gradients(model)
    for branch, kept in zip(wrapped.branches, wrapped.kept, strict=True):
        part = f"layers.{branch.layer}.{'self_attn' if branch.kind == 'attention' else 'mlp'}."
        assert any(part in name for name in found) == kept
    assert set(found) < set(whole)
    assert "lm_head.weight" in found


def test_rate_zero_changes_nothing_and_undo_gives_the_model_back() -> None:
    plain, model = gradients(llama()), llama()
    wrapped = dropbp.wrap(model, rate=0)
    found = gradients(model)
    assert set(found) == set(plain) and all(torch.equal(g, plain[n]) for n, g in found.items())
    again = dropbp.wrap(wrapped.undo(), rate=0.75).undo()
    assert all(torch.equal(g, plain[n]) for n, g in gradients(again).items())


def test_every_optimizer_step_brings_the_next_draw_and_measures_after_a_tenth() -> None:
    model = llama(num_hidden_layers=4)
    wrapped = dropbp.wrap(model, rate=0.5, steps=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    other = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1e-3)
    seen = []
    for _ in range(6):
        for _ in range(2):  # micro-batches share the draw
            seen.append(wrapped.kept)
            model(**batch()).loss.backward()
        chance = torch.get_rng_state()
        optimizer.step()
        other.step()
        optimizer.zero_grad()
        assert torch.equal(torch.get_rng_state(), chance)
    assert wrapped.step == 6 and wrapped.measured
    assert seen[0::2] == seen[1::2] and len(set(seen)) > 2
    assert wrapped.dropped == pytest.approx(0.5, abs=0.011)
    assert len(set(wrapped.rates)) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's compiler, looking at tensors
def test_compiled_layers_say_the_same() -> None:
    plain, model = llama(), llama()
    dropbp.wrap(plain, rate=0.5)
    dropbp.wrap(model, rate=0.5)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    wanted, found = gradients(plain), gradients(model)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # the name that every version knows
def test_computing_activations_again_says_the_same() -> None:
    plain, model = llama(), llama()
    dropbp.wrap(plain, rate=0.5)
    dropbp.wrap(model, rate=0.5)
    model.gradient_checkpointing_enable()
    wanted, found = gradients(plain.train()), gradients(model.train())
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_model_without_known_branches_is_refused_by_name() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    model = Gemma2ForCausalLM(Gemma2Config(num_attention_heads=4, num_key_value_heads=2, **shape))
    for one in (model, nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(
            Refused, match=f"{type(one).__name__} has no layers whose residual branches are known"
        ):
            dropbp.wrap(one, rate=0.5)


@pytest.mark.parametrize("rate", [-0.5, 0.96])
def test_a_rate_outside_is_refused(rate: float) -> None:
    with pytest.raises(Refused, match="dropbp is"):
        dropbp.wrap(llama(), rate=rate)


@pytest.mark.filterwarnings("ignore:.*pin_memory")  # of a trainer on a machine without a GPU
def test_the_example_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    model = llama()
    ids = batch()["input_ids"]
    data = [{"input_ids": row, "labels": row} for row in ids for _ in range(4)]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "example.py"), init_globals={"model": model, "data": data})
    assert names["dropping"].measured and names["dropping"].dropped == pytest.approx(0.5, abs=0.011)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
