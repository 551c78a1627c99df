"""Tuning a member: what is refused before anything is trained, what is learned, and what the family then remembers."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.build import RUNS, load_modules, read_family, verify_member
from heliostat.errors import Refused
from heliostat.export import rename_member
from heliostat.family import SHARINGS
from heliostat.files import locked
from heliostat.llm import LLM
from heliostat.train.evaluate import evaluate
from heliostat.train.loop import Interrupted
from heliostat.train.recipe import Recipe
from heliostat.train.tune import Job, Outcome, first_prompts, note_evaluation, prepare, tune

Tune = Callable[..., Outcome]


def recipe(folder: Path, data: Path, **options: Any) -> Recipe:
    facts = {"family": str(folder), "member": "m", "sharing": "sun", "data": str(data), "max_length": 128}
    return Recipe(**{**facts, **options})


def everything_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


# What is refused leaves the family as it was


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"member": "math"}, "already a member 'math'"),
        ({"member": "math.own"}, "is the name of a module"),
        ({"member": "a/b"}, "no member name"),
        (
            {"tuner": "lora", "target_modules": "q_proj,w_proj"},
            "target_modules w_proj: this model has .*q_proj",
        ),
        (
            {"tuner": "lora", "sharing": "icarus", "target_modules": "q_proj,k_proj,v_proj"},
            "target_modules k_proj, v_proj: under 'icarus' the member writes no keys",
        ),
        (
            {"tuner": "paca", "r": 33, "target_modules": "q_proj,down_proj"},
            "r is 33: q_proj has 32 inputs, so no more columns can be tuned",
        ),
        ({"max_length": 8}, "more than max_length 8"),
        ({"resume_from_checkpoint": True}, "--resume-from-checkpoint true, but .*m holds no checkpoint"),
        ({"eval_data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"family": "nowhere"}, "nowhere is no family"),
    ],
)
def test_refusals_come_before_training(
    tiny_family: Path, tiny_data: Path, options: dict[str, Any], message: str
) -> None:
    before = read_family(tiny_family), everything_in(tiny_family / "modules")
    with pytest.raises(Refused, match=message):
        tune(recipe(tiny_family, tiny_data, **options), watching=never)
    assert (read_family(tiny_family), everything_in(tiny_family / "modules")) == before


def never(job: Job) -> Any:
    """Nothing that is refused for its words gets as far as being watched, but one wish about its folder."""
    assert job.recipe.resume_from_checkpoint is True
    return nullcontext()


@pytest.mark.parametrize("sharing", ["sun", "prefillshare", "icarus"])
def test_a_text_has_no_halves(bare_family: Path, tmp_path: Path, tune_member: Tune, sharing: str) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"one and {n} is more"}) + "\n" for n in range(8)))
    with pytest.raises(Refused, match=rf"plain text.*sharing '{sharing}'.*use --sharing independent"):
        tune_member(bare_family, "m", sharing, texts, max_steps=2)
    assert tune_member(bare_family, "m", "independent", texts, max_steps=2).member.row.alone


def test_two_runs_of_one_member_do_not_mix(bare_family: Path, tiny_data: Path, tune_member: Tune) -> None:
    (bare_family / RUNS / "m").mkdir(parents=True)
    with locked(bare_family / RUNS / "m" / "run.lock"):
        with pytest.raises(Refused, match=r"runs/m is held by another heliostat command"):
            tune_member(bare_family, "m", "sun", tiny_data, max_steps=1)
    assert tune_member(bare_family, "m", "sun", tiny_data, max_steps=1).member.name == "m"


# What a job is


def test_a_job_holds_what_its_row_needs(bare_family: Path, tiny_data: Path) -> None:
    for sharing, tuner, names in (
        ("independent", "full", {"m.own"}),
        ("sun", "full", {"m.own", "base"}),
        ("icarus", "lora", {"m.own", "base"}),
        ("independent", "lora", {"m.own", "base"}),
        ("independent", "paca", {"m.own"}),  # its columns stand in the weights: there is no base any more
        ("sun", "paca", {"m.own", "base"}),
    ):
        job = prepare(recipe(bare_family, tiny_data, sharing=sharing, tuner=tuner))
        assert job.modules.keys() == names and job.row == SHARINGS[sharing].instantiate("m.own")
        assert (len(job.examples), job.steps, job.skipped) == (24, 3, 0)
        assert (job.trainable == job.total) == ((sharing, tuner) == ("independent", "full"))
        if "base" in names and tuner != "full":
            assert job.modules["base"].model is job.modules["m.own"].model
    assert not (bare_family / RUNS).exists()  # preparing writes nothing


def test_an_example_is_no_longer_than_the_model(bare_family: Path, tiny_data: Path) -> None:
    assert prepare(recipe(bare_family, tiny_data, max_length=9999)).recipe.max_length == 256


def test_epochs_and_batches_make_steps(bare_family: Path, tiny_data: Path) -> None:
    options = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "num_train_epochs": 2.5}
    job = prepare(recipe(bare_family, tiny_data, **options))
    assert job.steps == 8  # 24 examples, 10 a step: 3 steps an epoch, 2.5 times, rounded up


def test_what_was_left_out_is_told(bare_family: Path, tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    long = json.dumps({"prompt": "add " * 90, "completion": "5"})
    data.write_text(tiny_data.read_text() + f'{{"prompt": 5}}\n{long}\n')
    told: list[str] = []
    job = prepare(recipe(bare_family, data, skip_bad=True, too_long="skip"), echo=told.append)
    assert (len(job.examples), job.skipped) == (24, 2)
    assert f"left out 1 bad lines, the first: {data}:25: " in told[0] and "1 records longer" in told[1]


BAD = {
    "malformed": ("{", "malformed JSON"),
    "empty": (json.dumps({"prompt": "add 1 and 1", "completion": " "}), "empty answer|empty completion"),
    "role": (
        json.dumps({"prompt": [{"role": "assistant", "content": "5"}], "completion": "5"}),
        "wrong role order",
    ),
    "bytes": ('{"prompt": "\xff", "completion": "5"}', "not UTF-8"),
    "long": (json.dumps({"prompt": "add " * 200, "completion": "5"}), "more than max_length 12"),
}


# A teacher's prompts need no answers; held-out records that are too long are left out.
FAULTS = [
    (kind, use)
    for kind in BAD
    for use in ("data", "eval_data", "teacher")
    if (kind, use) not in {("empty", "teacher"), ("long", "eval_data")}
]


@pytest.mark.parametrize(("kind", "use"), FAULTS)
def test_a_bad_line_is_named_before_training_and_counted_where_it_may_be_left_out(
    bare_family: Path, tiny_data: Path, tmp_path: Path, kind: str, use: str
) -> None:
    bad, (line, reason) = tmp_path / "bad.jsonl", BAD[kind]
    good = tiny_data.read_text().splitlines()[:3]
    bad.write_bytes("\n".join([*good[:2], line, good[2]]).encode("latin-1" if kind == "bytes" else "utf-8"))
    asked: dict[str, Any] = {"eval_data": str(bad)} if use == "eval_data" else {}
    asked |= {"teacher": "base"} if use == "teacher" else {}
    data = tiny_data if use == "eval_data" else bad
    with pytest.raises(Refused, match=rf"bad.jsonl:3: .*({reason})"):
        tune(recipe(bare_family, data, **asked), watching=never)
    told: list[str] = []
    if use == "teacher":
        return  # an untrained teacher ends no answer; test_teacher counts what is skipped
    job = prepare(recipe(bare_family, data, skip_bad=True, **asked), echo=told.append)
    assert len(told) == 1 and told[0].startswith(f"left out 1 bad lines, the first: {bad}:3: ")
    assert len(job.examples if use == "data" else job.held_out) == 3


def test_several_files_are_one_set(bare_family: Path, tiny_data: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "one and two"}) + "\n")
    both = [str(tiny_data), str(texts)]
    job = prepare(recipe(bare_family, tiny_data, sharing="independent").model_copy(update={"data": both}))
    assert len(job.examples) == 25 and job.examples[-1].answers == ((1, len(job.examples[-1].ids)),)
    with pytest.raises(Refused, match=r"^\S*texts.jsonl is plain text"):  # the one that does not fit is named
        prepare(recipe(bare_family, tiny_data).model_copy(update={"data": both}))


# What a run leaves


@pytest.mark.parametrize("sharing", list(SHARINGS))
def test_a_member_learns_and_is_remembered(
    bare_family: Path, tiny_data: Path, tune_member: Tune, sharing: str
) -> None:
    options = {"max_steps": 30, "learning_rate": 0.01, "logging_steps": 1, "eval_data": str(tiny_data)}
    outcome = tune_member(bare_family, "m", sharing, tiny_data, **options)
    losses = [record["loss"] for record in outcome.history]
    assert len(losses) == 30 and sum(losses[-3:]) < 0.8 * sum(losses[:3])
    family = read_family(bare_family)
    member = family.member("m")
    assert member == outcome.member and member.row == SHARINGS[sharing].instantiate("m.own")
    assert member.evaluation == {"loss": losses[-1], "eval_loss": outcome.history[-1]["eval_loss"]}
    verify_member(family, "m")
    assert family.module("m.own").parameters >= outcome.parameters
    assert not {"family", "member"} & member.recipe.keys() and member.recipe["max_steps"] == 30
    assert [key for key, value in member.recipe.items() if value == "auto"] == ["resume_from_checkpoint"]
    left = {p.name for p in outcome.run_folder.iterdir()}
    assert {"log.jsonl", "loss.svg", "recipe.yaml"} <= left
    assert not any(name.startswith("checkpoint") for name in left)


def test_the_same_recipe_makes_the_same_member_and_another_seed_another(
    bare_family: Path, tiny_data: Path, tune_member: Tune
) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        tune_member(bare_family, name, "icarus", tiny_data, tuner="lora", max_steps=2, seed=seed)
    modules = read_family(bare_family).modules
    one, two, three = (modules[f"{name}.own"].digest for name in ("one", "two", "three"))
    assert one == two != three


def test_a_full_module_is_stored_as_the_base_is(
    bare_family: Path, tiny_data: Path, tune_member: Tune
) -> None:
    tune_member(bare_family, "m", "sun", tiny_data, max_steps=1)
    base, own = (json.loads((bare_family / p / "config.json").read_text()) for p in ("base", "modules/m.own"))
    assert base == own and own["dtype"] == "float32"


def test_a_run_goes_on_where_it_was_cut(bare_family: Path, tiny_data: Path, tune_member: Tune) -> None:
    class Impatient:
        def step(self, record: Any) -> None:
            if record["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)

    options: dict[str, Any] = {"max_steps": 6, "learning_rate": 0.03, "tuner": "full"}
    with pytest.raises(Interrupted):
        tune(recipe(bare_family, tiny_data, **options), watching=lambda job: nullcontext(Impatient()))
    assert "m" not in read_family(bare_family).members
    first = tune_member(bare_family, "m", "sun", tiny_data, **options, resume_from_checkpoint=True)
    whole = tune_member(bare_family, "whole", "sun", tiny_data, **options)
    modules = read_family(bare_family).modules
    assert modules["m.own"].digest == modules["whole.own"].digest
    assert [r["loss"] for r in first.history] == [r["loss"] for r in whole.history]


def test_a_module_name_that_is_taken_gets_a_number(
    tiny_family: Path, tiny_data: Path, tune_member: Tune
) -> None:
    rename_member(tiny_family, "math", "sums")
    assert (
        tune_member(tiny_family, "math", "sun", tiny_data, max_steps=1).member.row.prompt_writer
        == "math.own-2"
    )
    family = read_family(tiny_family)
    assert family.row("sums").prompt_writer == "math.own"
    load_modules(tiny_family, family, ["math.own", "math.own-2"], dtype=torch.float32)


def test_an_evaluation_is_noted_beside_the_others(tiny_family: Path) -> None:
    before = read_family(tiny_family).member("math")
    note_evaluation(tiny_family, "math", {"accuracy": 0.5})
    after = read_family(tiny_family).member("math")
    assert after.evaluation == {**before.evaluation, "accuracy": 0.5}
    assert (after.row, after.digests, after.recipe) == (before.row, before.digests, before.recipe)
    with pytest.raises(Refused, match="no member 'gone'"):
        note_evaluation(tiny_family, "gone", {})


def test_first_prompts_are_the_held_out_ones_where_there_are_any(tiny_data: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held.jsonl"
    held_out.write_text(json.dumps({"prompt": "why", "completion": "so"}) + "\n")
    shown = [first_prompts(recipe(tmp_path, tiny_data, eval_data=e), 2) for e in (None, str(held_out))]
    assert [[r.question[-1].content for r in records] for records in shown] == [
        ["add 0 and 0", "add 0 and 1"],
        ["why"],
    ]


# Accuracy in the course of a run


def test_right_answers_are_counted_during_the_run_and_change_nothing(
    bare_family: Path, tiny_data: Path, tune_member: Tune
) -> None:
    options = {"max_steps": 60, "learning_rate": 0.01, "logging_steps": 1}
    plain = tune_member(bare_family, "one", "independent", tiny_data, **options)
    graded = {"eval_data": str(tiny_data), "metric": "contains", "eval_steps": 25, "eval_samples": 24}
    judged = tune_member(bare_family, "two", "independent", tiny_data, **options, **graded)
    assert [r["loss"] for r in plain.history] == [r["loss"] for r in judged.history]
    found = [(r["step"], r["eval_accuracy"]) for r in judged.history if "eval_accuracy" in r]
    assert [step for step, _ in found] == [25, 50, 60] and all(0 <= right <= 1 for _, right in found)
    # What the finished member is graded at, as it is served, is what the run said last.
    llm = LLM(bare_family, members=["two"], dtype="float32", cache_mib=16)
    assert evaluate(llm, "two", tiny_data, metric="contains").accuracy == pytest.approx(found[-1][1])
    assert found[-1][1] > 0, "the toy has learned nothing: this test shows nothing"
    logged = [json.loads(line) for line in (judged.run_folder / "log.jsonl").read_text().splitlines()]
    assert [r["eval_accuracy"] for r in logged if "eval_accuracy" in r] == [right for _, right in found]
    assert "right answers" in (judged.run_folder / "loss.svg").read_text()
    assert "right answers" not in (plain.run_folder / "loss.svg").read_text()


@pytest.mark.parametrize("sharing", list(SHARINGS))
def test_every_row_is_asked_as_itself(
    bare_family: Path, tiny_data: Path, tune_member: Tune, sharing: str
) -> None:
    options = {"eval_data": str(tiny_data), "eval_steps": 2, "eval_samples": 5, "metric": "exact"}
    outcome = tune_member(bare_family, "m", sharing, tiny_data, max_steps=4, **options)
    assert sum("eval_accuracy" in record for record in outcome.history) == 2


def test_a_run_that_is_only_judged_at_its_end_counts_no_answers(
    bare_family: Path, tiny_data: Path, tune_member: Tune
) -> None:
    outcome = tune_member(bare_family, "m", "sun", tiny_data, max_steps=2, eval_data=str(tiny_data))
    assert "eval_loss" in outcome.history[-1] and "eval_accuracy" not in outcome.history[-1]


def test_a_device_that_is_not_there_is_refused(bare_family: Path, tiny_data: Path) -> None:
    with pytest.raises(Refused, match=r"device is 'cuda:99'; torch sees here: cpu"):
        prepare(recipe(bare_family, tiny_data, device="cuda:99"))
    assert prepare(recipe(bare_family, tiny_data, device="cpu")).recipe.device == "cpu"
