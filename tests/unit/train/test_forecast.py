"""What a dry run says is what a run then does: parameters for every sharing and tuner, steps, tokens by module."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from heliostat.build import init_family, read_family
from heliostat.errors import Refused
from heliostat.family import SHARINGS
from heliostat.train.forecast import Forecast, forecast
from heliostat.train.recipe import Recipe
from heliostat.train.tune import objective_of, prepare


def recipe(folder: Path, data: Path, **options: Any) -> Recipe:
    facts = {"family": str(folder), "member": "m", "sharing": "sun", "data": str(data), "max_length": 128}
    return Recipe(**{**facts, **options})


@pytest.mark.parametrize("tuner", ["full", "lora", "paca"])
@pytest.mark.parametrize("sharing", list(SHARINGS))
def test_it_counts_what_is_really_trained_and_run(
    bare_family: Path, tiny_data: Path, sharing: str, tuner: str
) -> None:
    asked = recipe(bare_family, tiny_data, sharing=sharing, tuner=tuner, bf16=False)
    told, job = forecast(asked), prepare(asked)
    assert told.trainable == job.trainable
    assert told.trainable + told.frozen == job.total
    assert (told.steps, told.examples) == (job.steps, len(job.examples))
    assert told.answer_tokens == sum(stop - start for e in job.examples for start, stop in e.answers)
    assert told.tokens_per_step.keys() == {n.replace("m.own", "own") for n in job.row.modules}
    # Without padding a step runs no more tokens than are told.
    micros = [micro for step in range(job.steps) for micro in objective_of(job).micros(step)]
    assert sum(micro.tokens for micro in micros) / job.steps <= sum(told.tokens_per_step.values())
    models = {id(m.model): m.model for m in job.modules.values()}
    held = sum(p.numel() * p.element_size() for model in models.values() for p in model.parameters())
    if (sharing, tuner) == (
        "independent",
        "paca",
    ):  # the pretrained columns, kept beside those in the weights
        held += 4 * job.trainable
    assert told.weights == held
    assert told.optimizer == 12 * job.trainable and told.activations > 0 and told.seconds_per_step > 0


@pytest.mark.parametrize(
    "shape",
    [
        {"model_type": "qwen3", "head_dim": 8},
        {"model_type": "qwen2", "tie_word_embeddings": False},
        {"num_key_value_heads": 4, "num_hidden_layers": 1, "head_dim": 16},
        {"model_type": "heliostat_llama", "attention": {"kind": "affine+gated"}},
    ],
    ids=["norms", "biases", "heads", "affine"],
)
def test_other_shapes_are_counted_as_well(
    make_checkpoint: Callable[..., Path], tiny_data: Path, tmp_path: Path, shape: dict[str, Any]
) -> None:
    init_family(tmp_path / "fam", make_checkpoint(**shape))
    for sharing, tuner in (("sun", "full"), ("icarus", "full"), ("icarus", "lora"), ("sun", "paca")):
        asked = recipe(tmp_path / "fam", tiny_data, sharing=sharing, tuner=tuner, bf16=False)
        told, job = forecast(asked), prepare(asked)
        assert (told.trainable, told.trainable + told.frozen) == (job.trainable, job.total), (sharing, tuner)


def test_a_row_that_reads_elsewhere_runs_fewer_tokens(bare_family: Path, tiny_data: Path) -> None:
    """Under prefillshare the member's own module runs answers alone; under sun the base does."""
    share, sun, alone = (
        forecast(recipe(bare_family, tiny_data, sharing=s)).tokens_per_step
        for s in ("prefillshare", "sun", "independent")
    )
    assert share["own"] < share["base"] and sun["base"] < sun["own"] <= alone["own"]


def test_accumulation_is_told_by_the_step(bare_family: Path, tiny_data: Path) -> None:
    one, two = (
        forecast(recipe(bare_family, tiny_data, per_device_train_batch_size=4, gradient_accumulation_steps=n))
        for n in (1, 2)
    )
    assert (one.steps, two.steps) == (6, 3)
    assert {n: 2 * t for n, t in one.tokens_per_step.items()} == two.tokens_per_step


def test_recomputation_and_bfloat16_take_less(bare_family: Path, tiny_data: Path) -> None:
    options: dict[str, Any] = {"sharing": "sun", "tuner": "lora"}
    plain = forecast(recipe(bare_family, tiny_data, bf16=False, **options))
    again = forecast(recipe(bare_family, tiny_data, bf16=False, gradient_checkpointing=True, **options))
    half = forecast(recipe(bare_family, tiny_data, bf16=True, **options))
    assert again.activations < plain.activations and half.weights < plain.weights
    assert again.weights == plain.weights and again.optimizer == half.optimizer == plain.optimizer


def test_the_json_is_complete(bare_family: Path, tiny_data: Path) -> None:
    told = forecast(recipe(bare_family, tiny_data))
    facts = json.loads(json.dumps(told.to_json()))
    assert facts.keys() == {f.name for f in fields(Forecast)} | {"memory", "seconds"}
    assert facts["memory"] == told.weights + told.optimizer + told.activations + told.process
    assert facts["seconds"] == pytest.approx(told.steps * told.seconds_per_step)
    assert (told.teacher, told.pages, told.seconds_answering, told.skipped) == (0, 0, 0.0, 0)
    shown = dict(told.rows())
    assert shown["trainable parameters"] == "28,192 (50.0% of what is loaded)"
    assert shown["optimizer steps"] == "3" and "s a step" in shown["time"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "nobody"}, "no member 'nobody'"),
        ({"member": "base"}, "is the name of a module"),
        ({"max_length": 8}, "more than max_length 8"),
        ({"tuner": "lora", "target_modules": "q_proj,w_proj"}, "target_modules w_proj: this model has"),
        ({"sharing": "icarus", "target_modules": "k_proj"}, "target_modules k_proj: under 'icarus'"),
        ({"eval_data": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_what_the_run_would_refuse_the_dry_run_refuses(
    bare_family: Path, tiny_data: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        forecast(recipe(bare_family, tiny_data, **options))


def test_texts_have_no_halves_in_a_dry_run_either(bare_family: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "one and two"}) + "\n")
    with pytest.raises(Refused, match="plain text"):
        forecast(recipe(bare_family, texts))
    assert forecast(recipe(bare_family, texts, sharing="independent")).examples == 1


@pytest.mark.parametrize("sharing", list(SHARINGS))
def test_a_teacher_is_counted(bare_family: Path, tiny_data: Path, sharing: str) -> None:
    options: dict[str, Any] = {"sharing": sharing, "tuner": "full", "bf16": False}
    alone = forecast(recipe(bare_family, tiny_data, **options))
    taught = forecast(recipe(bare_family, tiny_data, teacher="base", **options))
    base = read_family(bare_family).module("base").parameters
    assert taught.teacher == 4 * base and (taught.weights, taught.trainable) == (
        alone.weights,
        alone.trainable,
    )
    assert taught.examples == alone.examples and taught.answer_tokens == alone.answer_tokens
    # It reads what the row reads, prompts and answers; and it has said them all before the run.
    assert taught.tokens_per_step["teacher"] >= alone.answer_tokens / alone.steps
    assert taught.tokens_per_step.keys() - {"teacher"} == alone.tokens_per_step.keys()
    assert taught.activations > alone.activations and taught.seconds_answering > 0
    assert taught.memory >= taught.weights + taught.optimizer + taught.activations + taught.teacher
    assert "teacher" in dict(taught.rows())["tokens a step, by module"] and "  teacher" in dict(taught.rows())


def test_answers_that_nobody_knows_yet_take_all_the_room(bare_family: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "add 1 and 2"}\n{"prompt": "add 3 and 4", "completion": "7"}\n{"prompt": 5}\n'
    )
    with pytest.raises(Refused, match=r"prompts.jsonl:3: "):
        forecast(recipe(bare_family, prompts, teacher="base"))
    told = forecast(recipe(bare_family, prompts, teacher="base", skip_bad=True))
    assert (told.examples, told.skipped) == (2, 1) and dict(told.rows())["lines left out"] == "1"
    assert 128 / 2 < told.answer_tokens < 128 + 8


def test_a_teacher_that_is_half_a_model_is_refused(tiny_family: Path, tiny_data: Path) -> None:
    with pytest.raises(Refused, match="teacher 'math' shares its row with the base"):
        forecast(recipe(tiny_family, tiny_data, teacher="math"))


def test_evaluations_during_the_run_are_counted(bare_family: Path, tiny_data: Path) -> None:
    options = {"eval_data": str(tiny_data), "max_steps": 10}
    none, some = (forecast(recipe(bare_family, tiny_data, eval_steps=every, **options)) for every in (0, 4))
    assert none.pages == 0 and none.seconds_answering == 0
    assert some.pages > 0 and some.seconds_answering > 0 and some.seconds > some.steps * some.seconds_per_step
