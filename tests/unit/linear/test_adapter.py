"""Adapters in PEFT's format, both ways: PEFT reads ours, we read PEFT's, and what we do not run is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from heliostat.errors import Refused
from heliostat.linear.adapter import (
    adapter_bytes,
    adapter_facts,
    adapter_parameters,
    columns_as_lora,
    digest_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
    save_as_lora,
    selected,
)
from heliostat.linear.columns import Columns
from heliostat.linear.lora import adapter_of, add_adapter, parts_of, whole
from heliostat.model.config import read_config
from heliostat.model.seam import Causal
from heliostat.model.transformer import Transformer
from heliostat.model.weights import load_transformer

# PEFT asks transformers in a way that transformers will drop.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:Model has `tie_word_embeddings", "ignore:Setting `save_embedding_layers`"
)

IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(base: Path) -> Transformer:
    return load_transformer(base, read_config(base), dtype=torch.float32)


def logits(model: Transformer, adapter: str | None) -> torch.Tensor:
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    with torch.no_grad():
        return model.logits(model(IDS, positions, Causal(), whole(adapter)))


def stir(parameters: Any) -> None:
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=chance))


def peft_adapter(base: Path, folder: Path, **options: Any) -> torch.Tensor:
    """Save an adapter as PEFT does; its logits there."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    stir(p for n, p in sorted(peft.named_parameters()) if "lora_" in n)
    peft.save_pretrained(str(folder))
    with torch.no_grad():
        return peft(IDS).logits


@pytest.mark.parametrize("targets", [EVERY, ["q_proj", "o_proj"], ["down_proj"]])
def test_peft_runs_what_we_save(targets: list[str], tiny_base: Path, tmp_path: Path) -> None:
    model = load(tiny_base)
    add_adapter(model, "m.own", r=4, alpha=6, targets=targets)
    stir(p for part in adapter_of(model, "m.own").values() for p in (part.a, part.b))
    save_adapter(tmp_path, model, "m.own", r=4, alpha=6, base="base")
    there = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(there, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(model, "m.own"), peft(IDS).logits, rtol=0, atol=1e-4)
    assert adapter_parameters(tmp_path) == sum(
        p.numel() for part in adapter_of(model, "m.own").values() for p in part.parameters()
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": EVERY},
    "all-linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": EVERY, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": EVERY,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"k_proj": 16, r"model\.layers\.0\.mlp\.down_proj": 1},
    },
    "patterns-rslora": {
        "r": 4,
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r"layers\.\d+\.mlp\.up_proj": 3},
    },
    "some layers": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "dropout": {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_we_run_what_peft_saves(options: dict[str, Any], tiny_base: Path, tmp_path: Path) -> None:
    want = peft_adapter(tiny_base, tmp_path, **options)
    model = load(tiny_base)
    load_adapter(tmp_path, model, "theirs")
    torch.testing.assert_close(logits(model, "theirs"), want, rtol=0, atol=1e-4)
    assert (logits(model, None) - want).abs().max() > 0.01


def test_two_adapters_of_different_ranks_live_on_one_base(tiny_base: Path, tmp_path: Path) -> None:
    one = peft_adapter(tiny_base, tmp_path / "one", r=4, target_modules=EVERY)
    two = peft_adapter(tiny_base, tmp_path / "two", r=2, target_modules=["v_proj"])
    model = load(tiny_base)
    load_adapter(tmp_path / "one", model, "one")
    load_adapter(tmp_path / "two", model, "two")
    torch.testing.assert_close(logits(model, "one"), one, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(model, "two"), two, rtol=0, atol=1e-4)


Change = Callable[[Path], None]


@pytest.fixture
def saved(tiny_base: Path, tmp_path: Path) -> Path:
    """An adapter on q_proj and down_proj."""
    model = load(tiny_base)
    add_adapter(model, "m", r=2, alpha=4, targets=["q_proj", "down_proj"])
    save_adapter(tmp_path / "adapter", model, "m", r=2, alpha=4, base="base")
    return tmp_path / "adapter"


def say(folder: Path, **options: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_dora", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["x"]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", True),
        ("kasa_config", {"x": 1}),
        ("something_new", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "lora_ga"),
        ("r", 0),
        ("r", "four"),
        ("lora_alpha", "much"),
    ],
)
def test_what_we_do_not_run_is_refused_by_name(option: str, value: Any, saved: Path) -> None:
    say(saved, **{option: value})
    with pytest.raises(Refused, match=option):
        adapter_facts(saved)


def test_where_a_base_changing_start_was_undone_it_is_read(saved: Path) -> None:
    for harmless in (True, False, "gaussian", "orthogonal", "eva"):
        say(saved, init_lora_weights=harmless)
        adapter_facts(saved)


def test_what_does_not_fit_the_base_is_refused_by_name(saved: Path, tiny_base: Path) -> None:
    path, state = saved / "adapter_model.safetensors", load_file(saved / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"

    def refused(tensors: dict[str, torch.Tensor], message: str) -> None:
        save_file(tensors, path)
        with pytest.raises(Refused, match=message):
            load_adapter(saved, load(tiny_base), "x")

    refused({n: t for n, t in state.items() if n != name.format("A")}, "has only lora_B")
    refused(state | {name.format("A"): torch.zeros(2, 31)}, r"\(2, 31\)")
    refused(state | {name.format("B"): torch.zeros(32, 3)}, r"\(32, 3\)")
    refused({n.replace("layers.1", "layers.7"): t for n, t in state.items()}, "layers.7")
    refused({n.replace("self_attn.q_proj", "input_layernorm"): t for n, t in state.items()}, "no Linear")
    refused(state | {name.format("magnitude"): torch.zeros(1)}, "lora_magnitude")
    refused(state | {"base_model.model.lm_head.weight": torch.zeros(1)}, "lm_head")
    refused({}, "no adapter tensors")
    path.write_bytes(b"not safetensors")
    with pytest.raises(Refused, match="damaged"):
        load_adapter(saved, load(tiny_base), "x")


def test_an_adapter_on_the_head_is_refused_instead_of_forgotten(tiny_base: Path, tmp_path: Path) -> None:
    """The head takes no route: an adapter there would be loaded and never run."""
    peft_adapter(tiny_base, tmp_path, r=2, target_modules=["lm_head", "q_proj"])
    with pytest.raises(Refused, match="lm_head"):
        load_adapter(tmp_path, load(tiny_base), "x")


def test_a_pickled_adapter_is_refused_by_name(saved: Path, tiny_base: Path) -> None:
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(Refused, match=r"adapter_model\.bin is a pickle"):
        load_adapter(saved, load(tiny_base), "x")
    (saved / "adapter_model.bin").unlink()
    with pytest.raises(Refused, match=r"no adapter_model\.safetensors"):
        load_adapter(saved, load(tiny_base), "x")


def test_the_digest_follows_tensors_scaling_and_base(saved: Path) -> None:
    first = digest_adapter(saved, "base digest")
    assert digest_adapter(saved, "base digest", fresh=True) == first
    say(saved, lora_alpha=4, lora_dropout=0.5, base_model_name_or_path="elsewhere")
    assert digest_adapter(saved, "base digest") == first
    assert digest_adapter(saved, "another base") != first
    say(saved, lora_alpha=5)
    assert digest_adapter(saved, "base digest") != first
    say(saved, lora_alpha=4, use_rslora=True)
    assert digest_adapter(saved, "base digest") != first


# Tuned columns: PEFT's PaCA, and the LoRA that they are


def by_hand(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """An adapter as PEFT 0.22 writes it, written without any code of ours: columns on q_proj and down_proj."""
    folder.mkdir()
    chance = torch.Generator().manual_seed(3)
    state = {}
    for layer in range(2):
        for path, inputs in (("self_attn.q_proj", 32), ("mlp.down_proj", 64)):
            head = f"base_model.model.model.layers.{layer}.{path}."
            state[f"{head}paca_delta"] = 0.2 * torch.randn(32, 3, generator=chance)
            state[f"{head}paca_indices"] = torch.randperm(inputs, generator=chance)[:3].sort().values
    save_file(state, folder / "adapter_model.safetensors")
    facts = {"peft_type": "PACA", "task_type": "CAUSAL_LM", "r": 3, "paca_alpha": 6, "random_seed": None}
    facts |= {"target_modules": ["down_proj", "q_proj"], "init_weights": True, "modules_to_save": None}
    (folder / "adapter_config.json").write_text(json.dumps(facts | options))
    return state


def test_we_run_columns_as_peft_writes_them(tiny_base: Path, tmp_path: Path) -> None:
    state = by_hand(tmp_path / "paca")
    model, plain = load(tiny_base), load(tiny_base)
    load_adapter(tmp_path / "paca", model, "theirs")
    for name, delta in state.items():
        if name.endswith("paca_delta"):
            path = name.removeprefix("base_model.model.").removesuffix(".paca_delta")
            chosen = state[name.replace("paca_delta", "paca_indices")]
            dict(plain.named_parameters())[f"{path}.weight"].data[:, chosen] += 6 / 3 * delta
    torch.testing.assert_close(logits(model, "theirs"), logits(plain, None), rtol=0, atol=1e-5)
    assert adapter_parameters(tmp_path / "paca") == 4 * 32 * 3
    assert adapter_bytes(tmp_path / "paca", torch.bfloat16) == 4 * (32 * 3 * 2 + 3 * 8)


def test_columns_are_a_lora_that_peft_runs_and_come_back_as_columns(tiny_base: Path, tmp_path: Path) -> None:
    by_hand(tmp_path / "paca")
    inputs = {path: 32 if "q_proj" in path else 64 for path in read_adapter(tmp_path / "paca")}
    columns_as_lora(tmp_path / "paca", tmp_path / "lora", inputs)
    model, back = load(tiny_base), load(tiny_base)
    load_adapter(tmp_path / "paca", model, "x")
    load_adapter(tmp_path / "lora", back, "x")
    assert torch.equal(logits(model, "x"), logits(back, "x"))
    assert all(isinstance(part, Columns) for part in parts_of(back, "x").values())
    there = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(there, str(tmp_path / "lora")).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(model, "x"), peft(IDS).logits, rtol=0, atol=1e-5)


def test_ranks_that_differ_are_written_as_patterns(tiny_base: Path, tmp_path: Path) -> None:
    paths = {f"model.layers.{layer}.self_attn.q_proj": r for layer, r in ((0, 2), (1, 5))}
    columns = {path: (torch.randn(32, r), torch.arange(r)) for path, r in paths.items()}
    save_as_lora(tmp_path, columns, dict.fromkeys(paths, 32), base="base")
    model = load(tiny_base)
    load_adapter(tmp_path, model, "x")
    there = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(there, str(tmp_path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits(model, "x"), peft(IDS).logits, rtol=0, atol=1e-4)


def test_what_selects_columns_is_told_from_what_does_not() -> None:
    one = torch.eye(6)[[4, 0]]
    assert selected(one) is not None and selected(one).tolist() == [4, 0]  # type: ignore[union-attr]
    assert selected(one.bfloat16()) is not None
    for other in (
        one * 2,
        one + torch.eye(6)[[1, 1]],
        torch.eye(6)[[2, 2]],
        torch.zeros(2, 6),
        torch.randn(2, 6),
    ):
        assert selected(other) is None


def test_columns_that_do_not_fit_are_refused_by_name(tiny_base: Path, tmp_path: Path) -> None:
    state = by_hand(tmp_path / "a")
    name = "base_model.model.model.layers.0.self_attn.q_proj.paca_{}"

    def refused(message: str, **tensors: torch.Tensor | None) -> None:
        changed = {**state, **{name.format(n): t for n, t in tensors.items() if t is not None}}
        gone = {name.format(n) for n, t in tensors.items() if t is None}
        save_file(
            {n: t for n, t in changed.items() if n not in gone}, tmp_path / "a/adapter_model.safetensors"
        )
        with pytest.raises(Refused, match=message):
            load_adapter(tmp_path / "a", load(tiny_base), "x")

    refused("has only paca_delta", indices=None)
    refused(r"columns of \(31, 3\)", delta=torch.zeros(31, 3))
    refused("columns twice", indices=torch.tensor([1, 1, 2]))
    refused("others than 0 to 31", indices=torch.tensor([1, 2, 32]))
    refused("others than 0 to 31", indices=torch.tensor([-1, 2, 3]))
    refused("not whole numbers", indices=torch.zeros(3))
    for option, value in (("r", 0), ("paca_alpha", "much"), ("modules_to_save", ["lm_head"]), ("new", True)):
        by_hand(tmp_path / option, **{option: value})
        with pytest.raises(Refused, match=option):
            adapter_facts(tmp_path / option)
