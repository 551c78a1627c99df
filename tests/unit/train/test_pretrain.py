"""A base from scratch: texts in, an ordinary checkpoint out that transformers reads alike; runs that were cut go on."""

import json
import math
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from heliostat.build import init_family, load_modules, load_tokenizer, read_family
from heliostat.errors import Refused
from heliostat.llm import LLM
from heliostat.model.seam import Causal
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.weights import read_tensors, weight_files
from heliostat.train.loop import Interrupted
from heliostat.train.pretrain import Pretrained, new_model, pretrain
from heliostat.train.pretrain_recipe import PretrainRecipe
from heliostat.train.recipe import Recipe
from heliostat.train.step_log import read_steps
from heliostat.train.tune import tune
from heliostat.train.watch import Silent

SUMS = "\n\n".join(f"{a} and {b} is {a + b}" for a in range(12) for b in range(5))
WORDS = "\n\n".join(f"the word {w} comes before {w}s\n and  after  that\n\n" for w in "abcdefghij")


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    one, two = tmp_path / "sums.txt", tmp_path / "words.txt"
    one.write_text(SUMS)
    two.write_text(WORDS)
    return str(one), str(two)


def recipe(out: Path, *data: str, **options: Any) -> PretrainRecipe:
    facts = {
        "output_dir": str(out),
        "data": data,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 24,
        "vocab_size": 280,
        "max_position_embeddings": 64,
        "max_length": 32,
        "max_steps": 6,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "bf16": False,
    }
    return PretrainRecipe(**{**facts, **options})


def run(asked: PretrainRecipe, watch: Any = None, **options: Any) -> Pretrained:
    return pretrain(asked, watching=lambda settled: nullcontext(watch or Silent()), **options)


class Impatient:
    """Presses Ctrl-C in the third step."""

    def step(self, record: Any) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)


# The result


@pytest.mark.parametrize(
    "options",
    [{}, {"architecture": "qwen3", "tie_word_embeddings": False, "head_dim": 12}, {"architecture": "qwen2"}],
    ids=["llama", "qwen3", "qwen2"],
)
def test_two_texts_become_a_base_that_transformers_reads_alike(
    texts: tuple[str, str], tmp_path: Path, options: dict[str, Any]
) -> None:
    told: list[str] = []
    result = run(recipe(tmp_path / "base", *texts, **options), echo=told.append)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.tokens == 6 * 8 * 32 and "documents" in told[-1]
    family = init_family(tmp_path / "fam", result.folder)
    assert family.module("base").parameters == result.parameters
    ours = load_modules(tmp_path / "fam", family, ["base"], dtype=torch.float32)["base"].model
    theirs = AutoModelForCausalLM.from_pretrained(result.folder, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(result.folder).encode("3 and 4 is the word")])
    assert ids[0].tolist() == load_tokenizer(tmp_path / "fam", family).plain_prompt_ids("3 and 4 is the word")
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        logits = ours.logits(ours(ids, positions, Causal()))
        torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert {t.dtype for _, t in read_tensors(weight_files(result.folder))} == {torch.bfloat16}
    assert LLM(tmp_path / "fam", dtype="float32", cache_mib=4).generate("3 and 4", max_tokens=2)


@pytest.mark.parametrize("kind", ["sink", "gated", "affine", "affine+gated"])
def test_a_base_of_another_attention_is_a_base_like_any_other(
    texts: tuple[str, str], tmp_path: Path, tiny_data: Path, kind: str
) -> None:
    result = run(recipe(tmp_path / "base", *texts, attention=kind, max_steps=2, max_length=64))
    family = init_family(tmp_path / "fam", result.folder)
    assert family.module("base").parameters == result.parameters
    values: dict[str, Any] = {"family": str(tmp_path / "fam"), "data": str(tiny_data), "max_steps": 1}
    tune(
        Recipe(member="m", sharing="sun", max_length=64, bf16=False, **values),
        watching=lambda job: nullcontext(Silent()),
    )
    llm = LLM(tmp_path / "fam", dtype="float32", cache_mib=4)
    assert len(llm.generate(["3 and 4", "add 2"], member=["base", "m"], max_tokens=3)) == 2


def test_a_teacher_is_learned_from(texts: tuple[str, str], tmp_path: Path) -> None:
    teacher = run(recipe(tmp_path / "teacher", *texts, max_steps=30, attention="affine"))
    before = (teacher.folder / "model.safetensors").read_bytes()
    more: dict[str, Any] = {"teacher": str(teacher.folder), "distill_temperature": 2.0}
    pupil = run(recipe(tmp_path / "pupil", *texts, **more, max_steps=8, distill_weight=0.9, eval_share=0.2))
    assert (teacher.folder / "model.safetensors").read_bytes() == before
    assert (pupil.folder / "tokenizer.json").read_bytes() == (teacher.folder / "tokenizer.json").read_bytes()
    last = pupil.history[-1]
    assert last["eval_perplexity"] == pytest.approx(math.exp(last["eval_loss"]))
    assert last["loss"] < pupil.history[0]["loss"]
    with pytest.raises(Refused, match="has another tokenizer"):
        other = run(recipe(tmp_path / "other", *texts, max_steps=1, vocab_size=300))
        run(recipe(tmp_path / "no", *texts, teacher=str(teacher.folder), tokenizer=str(other.folder)))


def test_records_are_learned_as_well(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    items = [{"prompt": f"add {a} and {b}", "completion": str(a + b)} for a in range(5) for b in range(5)]
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in SUMS.split("\n\n")))
    result = run(recipe(tmp_path / "base", str(data), str(lines), max_steps=2, eval_data=str(lines)))
    assert result.history[-1]["eval_loss"] > 0
    assert set(read_family_of(result, tmp_path).modules) == {"base"}


def read_family_of(result: Pretrained, tmp_path: Path) -> Any:
    init_family(tmp_path / "fam", result.folder)
    return read_family(tmp_path / "fam")


def test_a_given_tokenizer_is_kept(texts: tuple[str, str], tmp_path: Path, tiny_base: Path) -> None:
    result = run(recipe(tmp_path / "base", *texts, tokenizer=str(tiny_base), max_steps=1, vocab_size=320))
    assert (result.folder / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()
    config = json.loads((result.folder / "config.json").read_text())
    assert config["vocab_size"] == 320 and not (tmp_path / "base.run" / "tokenizer").exists()


def test_a_text_without_empty_lines_is_held_out_at_its_end(tmp_path: Path) -> None:
    whole = tmp_path / "whole.txt"
    whole.write_text("one two three four five six seven. " * 60)
    result = run(recipe(tmp_path / "base", str(whole), max_steps=1))
    assert result.history[-1]["eval_loss"] > 0


def test_a_fresh_model_is_small_at_the_ends_of_its_branches() -> None:
    settled = recipe(Path("x"), "y", hidden_size=64, intermediate_size=128).resolve(bf16=False)
    state = dict(new_model(settled, 300).named_parameters())
    spread = {name.rsplit(".", 2)[-2]: float(p.detach().std()) for name, p in state.items() if p.dim() > 1}
    assert spread["q_proj"] == pytest.approx(64**-0.5, rel=0.1)
    assert spread["o_proj"] == pytest.approx(64**-0.5 / 2, rel=0.1)
    assert spread["embed_tokens"] == pytest.approx(0.02, rel=0.1)
    again = dict(new_model(settled, 300).named_parameters())
    assert all(torch.equal(again[name], p) for name, p in state.items())


# Runs that were cut


def test_a_cut_run_goes_on_and_ends_as_if_it_had_not_been(texts: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(recipe(tmp_path / "cut", *texts), Impatient())
    assert not (tmp_path / "cut").exists()
    resumed = run(recipe(tmp_path / "cut", *texts, resume_from_checkpoint=True))
    whole = run(recipe(tmp_path / "whole", *texts))
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in whole.history]
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("cut", "whole"))
    assert one == two
    left = {p.name for p in (tmp_path / "cut.run").iterdir()}
    assert {"log.jsonl", "steps.jsonl", "loss.svg", "gradient.svg", "recipe.yaml"} <= left
    assert not any("checkpoint" in name or "partial" in name for name in left)


@pytest.mark.parametrize("kind", ["affine+gated", "sink"])
def test_a_cut_run_of_another_attention_goes_on_to_the_bit(
    texts: tuple[str, str], tmp_path: Path, kind: str
) -> None:
    """Averages of alpha go on from the checkpoint; every step stands in the log once; checkpoints count nothing twice."""
    more = {"attention": kind, "save_steps": 2, "gradient_accumulation_steps": 2, "logging_steps": 4}
    with pytest.raises(Interrupted):
        run(recipe(tmp_path / "cut", *texts, **more), Impatient())
    resumed = run(recipe(tmp_path / "cut", *texts, **more))
    whole = run(recipe(tmp_path / "whole", *texts, **more, gradient_checkpointing=False))
    logs = [read_steps(tmp_path / f"{name}.run" / "steps.jsonl") for name in ("cut", "whole")]
    assert [r["step"] for r in logs[0]] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [r[key] for r in logs[0]] == [r[key] for r in logs[1]]
    states = [dict(read_tensors(weight_files(made.folder))) for made in (resumed, whole)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    again = run(recipe(tmp_path / "again", *texts, **more, gradient_checkpointing=True))
    averages = {n: t for n, t in read_tensors(weight_files(again.folder)) if n.endswith("alpha_ma")}
    assert len(averages) == (2 if kind != "sink" else 0)
    for name, tensor in averages.items():  # what is computed twice is counted once
        assert tensor.dtype == torch.float32 and float(tensor.min()) > 0 and float(tensor.max()) < 1
        torch.testing.assert_close(tensor, states[1][name], atol=1e-5, rtol=0)


def test_another_text_is_another_run(texts: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run(recipe(tmp_path / "base", *texts), Impatient())
    Path(texts[0]).write_text(SUMS.replace("is", "IS"))
    with pytest.raises(Refused, match="belongs to another recipe, data or base"):
        run(recipe(tmp_path / "base", *texts))
    assert run(recipe(tmp_path / "base", *texts, resume_from_checkpoint=False)).history[0]["step"] == 1


# What is refused


def test_an_output_that_exists_is_not_written_over(texts: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(Refused, match=r"base is already there; choose another output_dir, or remove it"):
        run(recipe(tmp_path / "base", *texts))
    assert not (tmp_path / "base.run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good until h\xe9re", "data.txt:1: not UTF-8: byte 0xe9 at position 12"),
        (b"", "data.txt holds no text"),
        (b" \n\n \n", "data.txt holds no text"),
        (None, "data.txt is missing"),
        (b"too\n\nshort", r"the text has \d+ tokens, less than one row of max_length 32"),
    ],
)
def test_texts_that_cannot_be_learned(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Refused, match=message):
        run(recipe(tmp_path / "base", str(path)))
    assert not (tmp_path / "base").exists()


def test_wishes_that_cannot_be_met(texts: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="resume-from-checkpoint true, but .* holds no checkpoint"):
        run(recipe(tmp_path / "base", *texts, resume_from_checkpoint=True))
    with pytest.raises(Refused):
        run(recipe(tmp_path / "base", *texts, tokenizer=str(tmp_path / "nowhere")))


def test_a_record_that_cannot_be_read_is_named_by_its_line(tmp_path: Path, tiny_base: Path) -> None:
    path = tmp_path / "d.jsonl"
    turns = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
    path.write_text(f"{json.dumps({'text': 'one and two'})}\n{json.dumps(turns)}\n")
    with pytest.raises(Refused, match=r"d.jsonl:2: .*read as text"):
        run(recipe(tmp_path / "out", str(path), tokenizer=str(tiny_base)))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one and two", "one")))
    with pytest.MonkeyPatch.context() as short:
        real = Tokenizer.plain_prompt_ids
        short.setattr(
            Tokenizer, "plain_prompt_ids", lambda self, text: [] if text == "one" else real(self, text)
        )
        with pytest.raises(Refused, match=r"d.jsonl:2: the text has fewer than two tokens"):
            run(recipe(tmp_path / "out", str(path), tokenizer=str(tiny_base)))
