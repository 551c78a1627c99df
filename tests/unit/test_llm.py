"""The offline face: what a prompt may be, answers in order whoever gives them, and streams that leave nothing behind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.build import Loaded, read_family
from heliostat.engine.request import Sampling
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.llm import DTYPES, LLM, parse_dtype
from heliostat.model.tokenizer import Tokenizer

ALL = ["base", "solo", "math", "code", "plan"]


@pytest.fixture(scope="module")
def llm(tiny_family_made: Path) -> LLM:
    """Every member and the base, in float32."""
    return LLM(tiny_family_made, dtype="float32", cache_mib=16)


@pytest.fixture(scope="module")
def bare(tiny_family_made: Path, llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The same modules behind a tokenizer without a chat template."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_family_made / "base" / name).read_bytes())
    model = llm.engine.runner.models["base"]
    row = Row("base", "base", "base", "base")
    return LLM.of({"base": Loaded("base", "d", "base", model)}, {"base": row}, Tokenizer.load(folder))


# Prompts


def test_a_text_is_a_users_turn(llm: LLM) -> None:
    ids = llm.prompt_ids("add 1 and 2")
    assert ids == llm.prompt_ids([{"role": "user", "content": "add 1 and 2"}])
    assert ids == tuple(llm.tokenizer.prompt_ids([{"role": "user", "content": "add 1 and 2"}]))
    assert llm.prompt_ids(ids) == llm.prompt_ids(list(ids)) == ids


def test_without_a_template_a_text_is_a_text(bare: LLM) -> None:
    assert bare.prompt_ids("add 1") == tuple(bare.tokenizer.plain_prompt_ids("add 1"))
    with pytest.raises(Refused, match="template"):
        bare.prompt_ids([{"role": "user", "content": "add 1"}])


@pytest.mark.parametrize(
    "prompt", [[], (), [1, "two"], [{"role": "user", "content": "a"}, 5], [1.5], 7, None]
)
def test_what_is_no_prompt(prompt: Any, llm: LLM) -> None:
    with pytest.raises(Refused, match="a prompt is a text"):
        llm.prompt_ids(prompt)


def test_each_form_of_prompt_gives_one_answer(llm: LLM) -> None:
    text = "add 1 and 2"
    forms: list[Any] = [text, [{"role": "user", "content": text}], list(llm.prompt_ids(text))]
    answers = [llm.generate(form, max_tokens=4) for form in forms]
    assert [len(found) for found in answers] == [1, 1, 1]
    assert len({found[0].ids for found in answers}) == 1
    assert [a.ids for a in llm.generate(forms, max_tokens=4)] == [answers[0][0].ids] * 3


# Answers


def test_answers_come_in_the_order_of_the_prompts_whoever_gives_them(llm: LLM) -> None:
    prompts = [f"add {n} and {n * n} " * (1 + n % 3) for n in range(10)]
    members = [ALL[n % 5] for n in range(10)]
    together = llm.generate(prompts, member=members, max_tokens=6, logprobs=0)
    assert [a.member for a in together] == members
    for prompt, member, answer in zip(prompts, members, together, strict=True):
        alone = llm.generate(prompt, member=member, max_tokens=6, logprobs=0)[0]
        assert answer.ids == alone.ids and answer.text == alone.text
        assert answer.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
        assert answer.prompt_tokens == len(llm.prompt_ids(prompt))
        assert len(answer.logprobs) == len(answer.ids) <= 6
    assert len({a.ids for a in llm.generate(["add 1 and 2"] * 5, member=ALL, max_tokens=8)}) > 1


def test_no_logprobs_unless_asked_and_a_reason_always(llm: LLM) -> None:
    short, long = (llm.generate("add 1 and 2", max_tokens=n, ignore_eos=True)[0] for n in (1, 400))
    assert short.logprobs == () and (short.finish_reason, len(short.ids)) == ("length", 1)
    assert long.prompt_tokens + len(long.ids) == llm.engine.max_length == 256
    assert llm.generate([], max_tokens=1) == []


def test_options_and_sampling_say_the_same(llm: LLM) -> None:
    facts: dict[str, Any] = {"max_tokens": 5, "temperature": 1.0, "seed": 7, "ignore_eos": True}
    one = llm.generate("hello", sampling=Sampling(**facts))
    assert [a.ids for a in one] == [a.ids for a in llm.generate("hello", **facts)]


def test_a_second_request_finds_what_the_first_wrote(llm: LLM) -> None:
    ids = [5 + n % 90 for n in range(64)]
    first, second = (llm.generate(ids, member="code", max_tokens=2)[0] for _ in range(2))
    other = llm.generate(ids, member="plan", max_tokens=2)[0]  # the base wrote both prompts
    assert first.cached_tokens == 0 and second.cached_tokens == other.cached_tokens == 48
    assert first.ids == second.ids


def test_members_that_are_not_there_are_named(llm: LLM, tiny_family_made: Path) -> None:
    with pytest.raises(Refused, match="no member 'mth' is loaded; there is: base, code, math, plan, solo"):
        llm.generate("a", member="mth")
    with pytest.raises(Refused, match="3 prompts but 2 members"):
        llm.generate(["a", "b", "c"], member=["math", "code"])
    with pytest.raises(Refused, match=r"no member 'mth' \(did you mean 'math'"):
        LLM(tiny_family_made, members=["mth"])


def test_a_refused_request_takes_its_company_with_it_and_leaves_nothing(llm: LLM) -> None:
    before = llm.engine.table.available()
    with pytest.raises(Refused):
        llm.generate([[5, 6, 7], [5] * 300], max_tokens=3)
    with pytest.raises(Refused, match="outside"):
        llm.generate([[5, 6, 7], [9999]], max_tokens=3)
    assert llm.engine.unfinished == 0 and llm.engine.table.available() == before
    assert llm.generate([5, 6, 7], max_tokens=3)


def test_only_what_its_members_need_is_loaded(tiny_family_made: Path) -> None:
    llm = LLM(tiny_family_made, members=["code"], dtype="float32", cache_mib=4)
    assert set(llm.engine.digests) == {"base", "code.own"}
    with pytest.raises(Refused, match="there is: code"):
        llm.generate("a", member="base")
    module = LLM(tiny_family_made, members=["math.own"], dtype="float32", cache_mib=4)
    assert module.generate("a", member="math.own", max_tokens=2)[0].member == "math.own"


# Streams


def pieces(llm: LLM, prompt: str, count: int) -> Sequence[str]:
    stream = llm.stream(prompt, member="math", max_tokens=12, ignore_eos=True)
    found = [next(stream) for _ in range(count)]
    stream.close()  # type: ignore[attr-defined]
    return found


def test_a_stream_says_what_generate_says(llm: LLM) -> None:
    options: dict[str, Any] = {"member": "plan", "max_tokens": 12, "ignore_eos": True}
    found = list(llm.stream("add 1 and 2", **options))
    assert "".join(found) == llm.generate("add 1 and 2", **options)[0].text
    assert len(found) > 1 and all(found)


def test_leaving_a_stream_early_frees_its_pages(llm: LLM) -> None:
    before = llm.engine.table.available()
    assert len(pieces(llm, "add 1 and 2", 2)) == 2
    assert llm.engine.unfinished == 0 and llm.engine.table.available() == before
    for _ in llm.stream("add 1 and 2", max_tokens=12, ignore_eos=True):
        break
    assert llm.engine.unfinished == 0 and llm.engine.table.available() == before


def test_one_stream_at_a_time(llm: LLM) -> None:
    stream = llm.stream("add 1 and 2", max_tokens=12, ignore_eos=True)
    next(stream)
    with pytest.raises(Refused, match="still being streamed"):
        llm.generate("hello", max_tokens=1)
    rest = "".join(stream)
    assert rest and llm.engine.unfinished == 0
    assert llm.generate("hello", max_tokens=1)


# Number formats


def test_dtypes_by_name(tiny_family_made: Path) -> None:
    assert [parse_dtype(name) for name in DTYPES] == [torch.float32, torch.bfloat16]
    with pytest.raises(Refused, match="dtype 'float16'; allowed are auto, float32, bfloat16"):
        LLM(tiny_family_made, dtype="float16")
    llm = LLM(tiny_family_made, members=["math"], dtype="bfloat16", cache_mib=4)
    assert {m.dtype for m in llm.engine.runner.models.values()} == {torch.bfloat16}
    assert (
        llm.engine.digests["base"] == f"{read_family(tiny_family_made).module('base').digest}/torch.bfloat16"
    )
    assert len(llm.generate("hello", member="math", max_tokens=3, ignore_eos=True)[0].ids) == 3


def test_a_length_is_kept_or_refused(tiny_family_made: Path) -> None:
    short = LLM(tiny_family_made, members=["base"], dtype="float32", max_length=32, cache_mib=4)
    assert short.engine.max_length == 32
    with pytest.raises(Refused, match="32"):
        short.generate([5] * 40)
    with pytest.raises(Refused, match="max_length is 500; the model runs 256"):
        LLM(tiny_family_made, members=["base"], dtype="float32", max_length=500)
