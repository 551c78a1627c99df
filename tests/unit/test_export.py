"""Models into a family and members out of it, for real layouts: what leaves loads elsewhere and says the same."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from heliostat.build import init_family, load_modules, read_family
from heliostat.errors import Refused
from heliostat.export import FACTS, export_member, import_member, remove_member, rename_member
from heliostat.files import locked
from heliostat.llm import LLM
from heliostat.model.seam import Causal
from heliostat.train.recipe import Recipe
from heliostat.train.tune import tune
from heliostat.train.watch import Silent

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's way to ask transformers

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "mistral": MistralConfig(**SHAPE, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
}
IDS = torch.randint(5, 250, (2, 11), generator=torch.Generator().manual_seed(0))


def real_checkpoint(
    kind: str, tokenizer_of: Path, folder: Path, *, seed: int = 0, dtype: str = "float32"
) -> PreTrainedModel:
    """A checkpoint as transformers writes it, in shards, with a tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_of)
    config = CONFIGS[kind]
    config.vocab_size, config.pad_token_id, config.bos_token_id = len(tokenizer), None, None
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return model


def train(family: Path, data: Path, member: str, sharing: str, tuner: str) -> None:
    facts: dict[str, Any] = {
        "family": str(family),
        "member": member,
        "sharing": sharing,
        "tuner": tuner,
        "data": (str(data),),
        "max_steps": 2,
        "learning_rate": 0.01,
        "max_length": 96,
        "bf16": False,
        "per_device_train_batch_size": 4,
    }
    tune(Recipe(**facts), watching=lambda job: nullcontext(Silent()))


def logits_here(family: Path, module: str) -> torch.Tensor:
    """Logits of one module of a family run alone."""
    loaded = load_modules(family, read_family(family), [module], dtype=torch.float32)[module]
    with torch.no_grad():
        positions = torch.arange(IDS.shape[1]).expand_as(IDS)
        return loaded.model.logits(loaded.model(IDS, positions, Causal(), loaded.route))


def logits_there(folder: Path, base: Path) -> torch.Tensor:
    """Logits of an exported folder in transformers, or in PEFT."""
    adapter = (folder / "adapter_config.json").exists()
    model: Any = AutoModelForCausalLM.from_pretrained(base if adapter else folder, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, str(folder))
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_real_layout_goes_through_the_whole_life(
    kind: str, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    base, family = tmp_path / "hf", tmp_path / "fam"
    real_checkpoint(kind, tiny_base, base)
    init_family(family, base)
    train(family, tiny_data, "math", "sun", "full")
    train(family, tiny_data, "plan", "icarus", "lora")
    tuned = real_checkpoint(kind, tiny_base, tmp_path / "tuned", seed=1)
    import_member(family, "old", tmp_path / "tuned")
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    ).eval()
    peft.save_pretrained(str(tmp_path / "lora"))
    import_member(family, "side", tmp_path / "lora")
    with torch.no_grad():
        torch.testing.assert_close(logits_here(family, "old.own"), tuned(IDS).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(logits_here(family, "side.own"), peft(IDS).logits, rtol=0, atol=1e-4)
    answers = LLM(family, dtype="float32").generate(
        ["add 1 and 2"] * 5, member=["base", "math", "plan", "old", "side"], max_tokens=4, ignore_eos=True
    )
    assert [len(a.ids) for a in answers] == [4] * 5
    for member in ("math", "plan", "old", "side"):
        out = export_member(family, member, tmp_path / f"{member}-out")
        got = logits_there(out, base)
        torch.testing.assert_close(got, logits_here(family, f"{member}.own"), rtol=0, atol=1e-4)
    again = tmp_path / "again"
    init_family(
        again, tmp_path / "old-out"
    )  # a whole model that was exported can be the base of another family
    torch.testing.assert_close(logits_here(again, "base"), logits_here(family, "old.own"), rtol=0, atol=0)


def reproduce(folders: list[Path], base: Path, prompts: list[str]) -> list[list[dict[str, Any]]]:
    """What each folder's own script says to each prompt, in a process without heliostat."""
    script = (
        "import contextlib, io, json, runpy, sys\n"
        "sys.modules['heliostat'] = None\n"
        "base, folders, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])\n"
        "for folder in folders:\n"
        "    for prompt in prompts:\n"
        "        sys.argv = ['reproduce.py', '--base', base, '--prompt', prompt, '--max-tokens', '12', '--json']\n"
        "        runpy.run_path(folder + '/reproduce.py', run_name='__main__')\n"
    )
    arguments = [str(base), json.dumps([str(f) for f in folders]), json.dumps(prompts)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    size = len(prompts)
    return [lines[i * size : (i + 1) * size] for i in range(len(folders))]


@pytest.mark.parametrize("template", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_script_beside_a_member_says_what_the_member_says(
    template: bool, tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    base, family = tmp_path / "hf", tmp_path / "fam"
    real_checkpoint("qwen3", tiny_base, base)
    prompts = ["add 2 and 3", "say hello"]
    if not template:
        (base / "chat_template.jinja").unlink()
        prompts = ["add 2 and 3", "a"]  # one token: the speaker reads it over nothing
    init_family(family, base)
    members = {
        "solo": ("independent", "full"),
        "math": ("sun", "full"),
        "code": ("prefillshare", "full"),
        "plan": ("icarus", "lora"),
        "wide": ("icarus", "full"),
        "thin": ("sun", "lora"),
        "cols": ("prefillshare", "paca"),
    }
    for member, (sharing, tuner) in members.items():
        train(family, tiny_data, member, sharing, tuner)
    llm = LLM(family, dtype="float32")
    outs = [export_member(family, member, tmp_path / member) for member in members]
    seen = set()
    for member, said in zip(members, reproduce(outs, base, prompts), strict=True):
        want = llm.generate(prompts, member=member, max_tokens=12)
        assert [tuple(s["prompt_ids"]) for s in said] == [llm.prompt_ids(p) for p in prompts]
        assert [tuple(s["ids"]) for s in said] == [a.ids for a in want], member
        assert [s["text"] for s in said] == [a.text for a in want]
        seen.add(tuple(a.ids for a in want))
    assert len(seen) == len(members)  # or a wrong row would pass unseen


def test_an_exported_folder_says_what_it_is(tiny_family: Path, tmp_path: Path) -> None:
    base = tiny_family / "base"
    (base / "LICENSE").write_text("do as you like")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# a base\n")
    out = export_member(tiny_family, "math", tmp_path / "math")
    card, facts = (out / "README.md").read_text(), json.loads((out / FACTS).read_text())
    assert (
        "Half a member" in card
        and "license: apache-2.0" in card
        and "| prompt_writer | this folder |" in card
    )
    assert (out / "LICENSE").read_text() == "do as you like"
    assert facts["row"] == {
        "prompt_writer": "own",
        "answer_writer": "base",
        "speaker": "base",
        "first_speaker": "own",
    }
    assert facts["digests"]["base"] == read_family(tiny_family).module("base").digest
    assert not facts["alone"] and facts["recipe"]["max_steps"] == 3
    assert (out / "tokenizer.json").exists() and not list(out.glob("digest.json"))
    whole = export_member(tiny_family, "solo", tmp_path / "solo")
    assert "A whole model" in (whole / "README.md").read_text()
    assert json.loads((whole / FACTS).read_text())["alone"]
    with pytest.raises(Refused, match="already there"):
        export_member(tiny_family, "math", tmp_path / "math")
    with pytest.raises(Refused, match="did you mean 'math'"):
        export_member(tiny_family, "maht", tmp_path / "x")


def refused_import(family: Path, source: Path, message: str) -> None:
    before = sorted(p.relative_to(family) for p in family.rglob("*"))
    with pytest.raises(Refused, match=message):
        import_member(family, "new", source)
    after = sorted(p.relative_to(family) for p in family.rglob("*"))
    assert [p for p in after if "modules" in p.parts] == [p for p in before if "modules" in p.parts]
    assert "new" not in read_family(family).members


def test_what_does_not_fit_the_family_is_refused_and_leaves_nothing(
    tiny_family: Path, tiny_base: Path, make_checkpoint: Any, tmp_path: Path
) -> None:
    refused_import(tiny_family, tmp_path / "nowhere", "no folder")
    refused_import(tiny_family, make_checkpoint(num_hidden_layers=3), "layers is 3")
    refused_import(tiny_family, make_checkpoint(max_position_embeddings=128), "128 tokens exactly")
    refused_import(tiny_family, make_checkpoint(rms_norm_eps=1e-3), "norm_eps is 0.001")
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    refused_import(tiny_family, other, r"another tokenizer than the family; what differs: chat template \(")
    (other / "generation_config.json").write_text('{"eos_token_id": [1, 2, 3]}')
    said = r"differs: special tokens, chat template.*chat_template.jinja, .*tokenizer.json.*the family's is"
    refused_import(tiny_family, other, said)
    for file in [*other.glob("tokenizer*"), other / "chat_template.jinja"]:
        file.unlink()
    import_member(tiny_family, "own-tokenizer-removed", other)
    broken = Path(shutil.copytree(tiny_base, tmp_path / "broken"))
    state = load_file(broken / "model.safetensors")
    state.pop("model.norm.weight")
    save_file(state, broken / "model.safetensors")
    refused_import(tiny_family, broken, "lacks 1 tensors")
    pickled = Path(shutil.copytree(tiny_base, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    refused_import(tiny_family, pickled, r"pytorch_model\.bin is a pickle")


def test_adapters_that_do_not_fit_are_refused_too(tiny_family: Path, tmp_path: Path) -> None:
    plan = tiny_family / read_family(tiny_family).module("plan.own").path
    pickled = Path(shutil.copytree(plan, tmp_path / "pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    refused_import(tiny_family, pickled, r"adapter_model\.bin is a pickle")
    strange = Path(shutil.copytree(plan, tmp_path / "strange"))
    facts = json.loads((strange / "adapter_config.json").read_text())
    (strange / "adapter_config.json").write_text(json.dumps(facts | {"use_dora": True}))
    refused_import(tiny_family, strange, "use_dora")
    for number, pattern in enumerate(({"(": 1}, ["q_proj"], {"q_proj": "x"})):
        odd = Path(shutil.copytree(plan, tmp_path / f"odd-{number}"))
        (odd / "adapter_config.json").write_text(json.dumps(facts | {"alpha_pattern": pattern}))
        refused_import(tiny_family, odd, "alpha_pattern must map patterns to numbers")
    speaking = Path(shutil.copytree(plan, tmp_path / "speaking"))
    for file in (tiny_family / "base").glob("tokenizer*"):
        shutil.copy(file, speaking / file.name)
    (speaking / "chat_template.jinja").write_text("{{ messages }}")
    refused_import(tiny_family, speaking, "another tokenizer")


def test_a_folder_left_by_a_process_that_died_is_in_nobody_s_way(
    tiny_family: Path, tiny_base: Path, tiny_data: Path
) -> None:
    for name in ("new.own", "next.own"):
        (tiny_family / "modules" / name).mkdir()
        (tiny_family / "modules" / name / "model.safetensors").write_text("half")
    import_member(tiny_family, "new", tiny_base)
    train(tiny_family, tiny_data, "next", "sun", "lora")
    answers = LLM(tiny_family, dtype="float32").generate("add 1 and 2", member="new", max_tokens=3)
    assert answers[0].ids
    assert not (tiny_family / "modules" / "next.own" / "model.safetensors").exists()


def test_names_and_removal(tiny_family: Path, tiny_base: Path) -> None:
    with pytest.raises(Refused, match="already a member 'math'"):
        import_member(tiny_family, "math", tiny_base)
    rename_member(tiny_family, "math", "sums")
    assert "sums" in read_family(tiny_family).members and "math" not in read_family(tiny_family).members
    LLM(tiny_family, members=["sums"], dtype="float32").generate("add 1 and 2", member="sums", max_tokens=2)
    assert remove_member(tiny_family, "sums") == ["modules/math.own"]
    assert not (tiny_family / "modules" / "math.own").exists()
    assert "math.own" not in read_family(tiny_family).modules
    with pytest.raises(Refused, match="no member 'sums'"):
        remove_member(tiny_family, "sums")
    import_member(tiny_family, "math", tiny_base)
    assert read_family(tiny_family).member("math").row.alone


def test_a_run_goes_with_its_member(tiny_family: Path, tiny_data: Path) -> None:
    runs = tiny_family / "runs"
    kept = (runs / "math" / "log.jsonl").read_text()
    (runs / "sums").mkdir()  # as a refused training leaves it
    rename_member(tiny_family, "math", "sums")
    assert (runs / "sums" / "log.jsonl").read_text() == kept and not (runs / "math").exists()
    train(tiny_family, tiny_data, "math", "sun", "lora")
    assert (runs / "sums" / "log.jsonl").read_text() == kept != (runs / "math" / "log.jsonl").read_text()
    remove_member(tiny_family, "sums")
    assert not (runs / "sums").exists() and (runs / "math").exists()


@pytest.mark.parametrize("name", ["math", "sums"])
def test_a_run_that_is_not_over_stays_where_it_is(tiny_family: Path, name: str) -> None:
    run, before = tiny_family / "runs" / name, (tiny_family / "family.json").read_bytes()
    run.mkdir(exist_ok=True)
    with locked(run / "run.lock"), pytest.raises(Refused, match="held by another heliostat command"):
        rename_member(tiny_family, "math", "sums")
    (run / "checkpoint-00000002").mkdir()
    (run / "checkpoint-00000002" / "state.json").touch()
    with pytest.raises(Refused, match=f"unfinished run of '{name}'.*to give it up"):
        rename_member(tiny_family, "math", "sums")
    if name == "math":
        with pytest.raises(Refused, match="unfinished run of 'math'"):
            remove_member(tiny_family, "math")
    assert run.exists() and (tiny_family / "family.json").read_bytes() == before


@pytest.mark.parametrize("path", ["", ".", "/tmp", "../other", "modules/../.."])
def test_a_module_outside_the_family_is_refused_and_nothing_is_removed(tiny_family: Path, path: str) -> None:
    facts = json.loads((tiny_family / "family.json").read_text())
    facts["modules"]["math.own"]["path"] = path
    (tiny_family / "family.json").write_text(json.dumps(facts))
    before = sorted(tiny_family.rglob("*"))
    with pytest.raises(Refused, match="no folder inside the family"):
        remove_member(tiny_family, "math")
    assert sorted(p for p in tiny_family.rglob("*") if p.name != "family.json.lock") == [
        p for p in before if p.name != "family.json.lock"
    ]


def test_damaged_facts_beside_an_exported_member_are_refused(tiny_family: Path, tmp_path: Path) -> None:
    out = export_member(tiny_family, "plan", tmp_path / "out")
    (out / "heliostat.json").write_text('{"digests": {}}')
    refused_import(tiny_family, out, "heliostat.json is damaged: 'base'")
