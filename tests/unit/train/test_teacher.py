"""A teacher's answers as data: asked as serving asks, ended answers only, and learned by a row of another sharing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.build import Loaded, load_modules, load_tokenizer, read_family
from heliostat.errors import Refused
from heliostat.export import export_member, import_member
from heliostat.family import SHARINGS
from heliostat.llm import LLM
from heliostat.model.tokenizer import Tokenizer
from heliostat.train.teacher import taught_examples
from heliostat.train.tune import Outcome

Tune = Callable[..., Outcome]
QUESTIONS = [f"add {a} and {b}" for a in range(4) for b in range(6)]


@pytest.fixture(scope="module")
def taught(
    bare_family_made: Path, tiny_data: Path, tune_member: Tune, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A whole model, tuned elsewhere until it ends its answers, as an ordinary checkpoint. Read only."""
    folder = tmp_path_factory.mktemp("taught")
    family = Path(shutil.copytree(bare_family_made, folder / "fam"))
    tune_member(family, "boss", "independent", tiny_data, max_steps=60, learning_rate=0.01)
    export_member(family, "boss", folder / "boss")
    return folder / "boss"


@pytest.fixture
def family(bare_family: Path, taught: Path) -> Path:
    """A family into which the teacher was imported."""
    import_member(bare_family, "boss", taught)
    return bare_family


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Prompts alone."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    return path


@pytest.fixture
def teacher(family: Path) -> Loaded:
    return load_modules(family, read_family(family), ["boss.own"], dtype=torch.float32)["boss.own"]


@pytest.fixture
def tokenizer(family: Path) -> Tokenizer:
    return load_tokenizer(family, read_family(family))


def test_the_answers_are_the_teachers_own_to_the_ids_that_serving_sees(
    family: Path, prompts: Path, teacher: Loaded, tokenizer: Tokenizer
) -> None:
    examples = taught_examples(prompts, tokenizer, teacher, max_length=64).examples
    llm = LLM(family, members=["boss"], dtype="float32", cache_mib=4)
    served = llm.generate(QUESTIONS, member="boss", max_tokens=64)
    wanted = [
        (*llm.prompt_ids(q), *a.ids)
        for q, a in zip(QUESTIONS, served, strict=True)
        if a.finish_reason == "stop"
    ]
    assert [example.ids for example in examples] == wanted and len(wanted) > len(QUESTIONS) / 2
    for example in examples:
        ((start, stop),) = example.answers
        assert stop == len(example.ids) and example.ids[-1] in tokenizer.eos_ids
        assert tuple(example.ids[:start]) in {llm.prompt_ids(q) for q in QUESTIONS}


def test_what_the_teacher_does_not_end_or_cannot_read_is_left_out_or_refused(
    prompts: Path, teacher: Loaded, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    length = len(tokenizer.prompt_ids([{"role": "user", "content": QUESTIONS[0]}]))
    with pytest.raises(
        Refused, match=rf"prompts.jsonl: the teacher ended no answer .*max_length {length + 1}"
    ):
        taught_examples(prompts, tokenizer, teacher, max_length=length + 1)
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "add " * 80}) + "\n")
    with pytest.raises(Refused, match=r"prompts.jsonl:25: .*more than max_length 63"):
        taught_examples(prompts, tokenizer, teacher, max_length=64)
    found = taught_examples(prompts, tokenizer, teacher, max_length=64, too_long="skip")
    assert 25 in [bad.line for bad in found.too_long]
    assert len(found.examples) + len(found.too_long) == 25


@pytest.mark.parametrize(("unended", "refused"), [(2, False), (3, True)])
def test_a_limit_that_many_answers_break_is_refused_not_passed_over(
    prompts: Path,
    teacher: Loaded,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    unended: int,
    refused: bool,
) -> None:
    whole = LLM.generate

    def cut(self: LLM, *given: Any, **options: Any) -> list[Any]:
        answers = whole(self, *given, **options)
        return [replace(answer, finish_reason="length") for answer in answers[:unended]] + answers[unended:]

    monkeypatch.setattr(LLM, "generate", cut)
    if refused:
        with pytest.raises(
            Refused, match=r"3 of 24 answers .* did not end within max_length 64: .*--too-long skip"
        ):
            taught_examples(prompts, tokenizer, teacher, max_length=64)
    found = taught_examples(
        prompts, tokenizer, teacher, max_length=64, too_long="skip" if refused else "refuse"
    )
    assert len(found.examples) == 24 - unended and len(found.too_long) == unended


def test_what_memory_does_not_hold_is_left_out_and_counted(
    prompts: Path, teacher: Loaded, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with prompts.open("a") as file:
        file.write(json.dumps({"prompt": "add " * 30}) + "\n")
    wanted = taught_examples(prompts, tokenizer, teacher, max_length=64, too_long="skip")
    monkeypatch.setattr("heliostat.train.teacher.longest_that_fits", lambda model, cache_mib: 64)
    found = taught_examples(prompts, tokenizer, teacher, max_length=250)
    assert found.examples == wanted.examples
    assert {bad.line for bad in found.too_long} == {bad.line for bad in wanted.too_long}
    assert any("memory for the teacher holds 64" in bad.reason for bad in found.too_long)
    short = 1 + len(tokenizer.prompt_ids([{"role": "user", "content": QUESTIONS[0]}]))
    monkeypatch.setattr("heliostat.train.teacher.longest_that_fits", lambda model, cache_mib: short)
    with pytest.raises(Refused, match=f"no answer within {short} tokens, which is what 1024 MiB"):
        taught_examples(prompts, tokenizer, teacher, max_length=250)


@pytest.mark.parametrize(("sharing", "tuner"), [("sun", "full"), ("prefillshare", "lora")])
def test_a_row_learns_from_prompts_alone_what_an_imported_teacher_says(
    family: Path, prompts: Path, tune_member: Tune, sharing: str, tuner: str
) -> None:
    options: dict[str, Any] = {"tuner": tuner, "teacher": "boss", "max_steps": 50, "learning_rate": 0.01}
    outcome = tune_member(family, "pupil", sharing, prompts, logging_steps=1, **options)
    losses = [record["loss"] for record in outcome.history]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    member = read_family(family).member("pupil")
    assert member.row == SHARINGS[sharing].instantiate("pupil.own")
    assert member.recipe["teacher"] == "boss" and "boss.own" not in member.row.modules
    llm = LLM(family, dtype="float32", cache_mib=4)
    said, before, wanted = (
        [a.ids for a in llm.generate(QUESTIONS, member=name, max_tokens=12)]
        for name in ("pupil", "base", "boss")
    )
    alike = [sum(a == b for a, b in zip(ids, wanted, strict=True)) for ids in (said, before)]
    assert alike[0] > alike[1]


def test_the_teachers_answers_count_not_the_datas(
    family: Path, tiny_data: Path, prompts: Path, tune_member: Tune
) -> None:
    options: dict[str, Any] = {"teacher": "boss", "max_steps": 2}
    tune_member(family, "one", "sun", tiny_data, **options)
    tune_member(family, "two", "sun", prompts, **options)
    digests = [read_family(family).module(name).digest for name in ("one.own", "two.own")]
    assert digests[0] == digests[1]


def test_only_a_whole_model_teaches(tiny_family: Path, tiny_data: Path, tune_member: Tune) -> None:
    for half in ("math", "code", "plan"):
        with pytest.raises(
            Refused, match=f"teacher '{half}' shares its row with the base; only a whole model"
        ):
            tune_member(tiny_family, "pupil", "sun", tiny_data, teacher=half)
    with pytest.raises(Refused, match=r"no member 'sol' \(did you mean 'solo'"):
        tune_member(tiny_family, "pupil", "sun", tiny_data, teacher="sol")
    assert "pupil" not in read_family(tiny_family).members


def test_a_bare_module_may_teach(family: Path, prompts: Path, tune_member: Tune) -> None:
    for number, name in enumerate(("boss", "boss.own")):
        tune_member(family, f"pupil{number}", "sun", prompts, teacher=name, max_steps=1)
    modules = read_family(family).modules
    assert modules["pupil0.own"].digest == modules["pupil1.own"].digest
