"""The engine of one process: what it refuses, how answers end, and that nothing leaks."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.build import Loaded
from heliostat.engine.engine import PAGE_SIZE, Engine, longest_that_fits, pages_that_fit
from heliostat.engine.request import Request, Sampling
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.llm import LLM
from heliostat.model.config import read_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.weights import load_transformer


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.load(tiny_base)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Loaded:
    model = load_transformer(tiny_base, read_config(tiny_base), dtype=torch.float32)
    return Loaded("base", "digest", "base", model)


@pytest.fixture
def engine(base: Loaded, tokenizer: Tokenizer) -> Engine:
    return Engine({"base": base}, tokenizer, max_length=64, pages=16, page_size=4)


def ask(engine: Engine, prompt: tuple[int, ...] = (5, 6, 7), module: str = "base", **options: Any) -> Request:
    row = Row(module, module, module, module)
    sampling = Sampling(**{"max_tokens": 6, "ignore_eos": True, **options})
    digests = {module: engine.digests.get(module, "of nothing here")}
    name = f"{id(options)}-{engine.unfinished}"
    return Request(name, row=row, digests=digests, prompt=prompt, sampling=sampling)


def run(engine: Engine, request: Request) -> str:
    engine.add(request)
    text = ""
    while engine.unfinished:
        text += "".join(piece.text for piece in engine.step())
    return text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": "elsewhere"}, "module elsewhere is not loaded; loaded are base"),
        ({"prompt": (5, 300)}, r"outside \[0, 300\)"),
        ({"prompt": (-1,)}, r"outside \[0, 300\)"),
        ({"logit_bias": {300: 1.0}}, r"logit_bias.*\[300\]"),
        ({"logit_bias": {-1: 1.0}}, r"logit_bias.*\[-1\]"),
        ({"prompt": tuple(range(5, 69))}, "the longest request here has 64"),
    ],
)
def test_what_can_never_run_is_refused_at_the_door(change: dict, message: str, engine: Engine) -> None:
    with pytest.raises(Refused, match=message):
        engine.add(ask(engine, **change))
    assert engine.unfinished == 0
    assert run(engine, ask(engine)) is not None  # and the next one is served


def test_an_engine_without_modules_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(Refused, match="at least one module"):
        Engine({}, tokenizer, max_length=8, pages=2)


def test_more_than_the_model_runs_exactly_is_refused(
    base: Loaded, tokenizer: Tokenizer, tiny_family: Path
) -> None:
    with pytest.raises(Refused, match="max_length is 257; the model runs 256"):
        Engine({"base": base}, tokenizer, max_length=257, pages=99)
    with pytest.raises(Refused, match="the model runs 256"):
        LLM(tiny_family, max_length=300)


def test_how_answers_end(engine: Engine, tokenizer: Tokenizer) -> None:
    first = ask(engine)
    whole = run(engine, first)
    assert first.finish_reason == "length" and len(first.answer) == 6
    assert tokenizer.decode(first.answer) == whole
    ended = ask(engine, ignore_eos=False, logit_bias={tokenizer.eos_ids[0]: 100.0})
    assert run(engine, ended) == "" and ended.finish_reason == "stop"
    assert ended.answer == [tokenizer.eos_ids[0]]
    full = ask(engine, prompt=(5,) * 60, max_tokens=50)
    run(engine, full)
    assert full.finish_reason == "length" and full.length == 64


def test_a_stop_string_ends_the_answer_before_it(engine: Engine) -> None:
    whole = run(engine, ask(engine, max_tokens=12))
    word = whole[len(whole) // 2 : len(whole) // 2 + 2]
    request = ask(engine, max_tokens=12, stop=(word,))
    assert run(engine, request) == whole[: whole.find(word)]
    assert request.finish_reason == "stop" and len(request.answer) < 12
    assert engine.table.available() == 16


def test_pieces_joined_are_the_answer_and_pages_come_back(engine: Engine) -> None:
    for _ in range(3):
        run(engine, ask(engine, prompt=(9, 8, 7, 6, 5), max_tokens=20))
    assert engine.table.available() == 16 and not engine._spoken


def test_an_aborted_request_leaves_nothing(engine: Engine) -> None:
    for steps in range(4):
        request = ask(engine, prompt=tuple(range(5, 20)), max_tokens=20)
        engine.add(request)
        for _ in range(steps):
            engine.step()
        assert engine.abort(request.id) and not engine.abort(request.id)
        assert request.finish_reason == "abort" and engine.unfinished == 0
        assert engine.table.available() == 16 and not engine._spoken
    assert engine.step() == []


def test_a_failing_pass_can_be_tried_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    want, request = run(engine, ask(engine)), ask(engine)
    engine.add(request)
    engine.step()
    monkeypatch.setattr(engine.runner, "run", lambda *passes: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        engine.step()
    monkeypatch.undo()
    while engine.unfinished:
        engine.step()
    assert engine.tokenizer.decode(request.answer) == want


def test_numbers_that_are_none_end_their_request_and_no_other(base: Loaded, tokenizer: Tokenizer) -> None:
    broken = copy.deepcopy(base.model)
    broken.get_parameter("model.layers.0.self_attn.v_proj.weight").data[:] = torch.nan
    modules = {"base": base, "broken": Loaded("broken", "other", "broken", broken)}
    engine = Engine(modules, tokenizer, max_length=64, pages=6, page_size=4)
    want, good = run(engine, ask(engine)), ask(engine)
    for _ in range(3):
        bad = ask(engine, module="broken", prompt=tuple(range(5, 24)))
        engine.add(bad)
        with pytest.raises(Refused, match="logits of 'broken' are not finite after 19 tokens"):
            engine.step()
        assert bad.finish_reason == "abort" and engine.unfinished == 0
    assert engine.runner.pool.values.isnan().any(dim=(0, 2, 3, 4)).sum() == 5  # the first answer keeps a page
    engine.add(good)
    engine.add(bad := ask(engine, module="broken"))
    with pytest.raises(Refused):
        engine.step()
    while engine.unfinished:
        engine.step()
    assert engine.tokenizer.decode(good.answer) == want


def test_pages_for_all_or_for_the_memory_there_is(base: Loaded) -> None:
    def fitting(**options: int) -> int:
        return pages_that_fit(base.model, **{"max_length": 100, "max_running": 4, "cache_mib": 64, **options})

    each = PAGE_SIZE * 2 * 2 * 2 * 8 * 4  # slots, layers, keys and values, heads, width, bytes
    assert fitting() == 7 * 4
    assert fitting(cache_mib=1, max_running=10_000) == 2**20 // each
    with pytest.raises(Refused, match="cache_mib is 0"):
        fitting(cache_mib=0)


def test_the_offline_face(tiny_family: Path) -> None:
    llm = LLM(tiny_family, dtype="float32")
    prompts: list[Any] = ["add 1 and 2", [{"role": "user", "content": "say hello"}], [7, 8, 9]]
    members = ["math", "base", "plan"]
    answers = llm.generate(prompts, member=members, max_tokens=5, logprobs=0)
    assert [a.member for a in answers] == members
    assert all(len(a.logprobs) == len(a.ids) for a in answers)
    assert "".join(llm.stream("add 1 and 2", member="math", max_tokens=5)) == answers[0].text
    assert llm.generate([]) == []
    assert len(llm.generate([7, 8, 9], max_tokens=1)) == 1  # one prompt of ids
    stream = llm.stream("add 1 and 2", member="math", max_tokens=5)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert llm.engine.unfinished == 0
    with pytest.raises(Refused, match="no member 'nobody'"):
        llm.generate("x", member="nobody")
    with pytest.raises(Refused, match="1 prompts but 2 members"):
        llm.generate(["x"], member=["base", "math"])
    with pytest.raises(Refused, match="longest request here has 256"):
        llm.generate([[7], [5] * 1000], max_tokens=2)
    assert llm.engine.unfinished == 0
    with pytest.raises(Refused, match="dtype 'float16'; allowed are auto, float32, bfloat16"):
        LLM(tiny_family, dtype="float16")
    with pytest.raises(Refused, match="heliostat init"):
        LLM(tiny_family / "nowhere")


def test_a_family_whose_texts_are_longer_than_the_memory_for_pages_answers_shorter_ones(
    base: Loaded, tokenizer: Tokenizer
) -> None:
    each = PAGE_SIZE * 2 * 2 * 2 * 8 * 4
    assert longest_that_fits(base.model, cache_mib=1) == 2**20 // each * PAGE_SIZE
    long = copy.copy(base.model)
    long.config = dataclasses.replace(base.model.config, max_length=2**20)
    llm = LLM.of({"base": dataclasses.replace(base, model=long)}, {}, tokenizer, cache_mib=1)
    assert llm.engine.max_length == longest_that_fits(base.model, cache_mib=1)


def test_what_is_no_prompt_and_a_second_answer_at_once_are_refused(tiny_family: Path) -> None:
    llm = LLM(tiny_family, members=["base"], dtype="float32")
    strange: list[Any] = [[1, {"role": "user", "content": "x"}], [1, 2.5], [], None]
    for prompt in strange:
        with pytest.raises(Refused, match="a prompt is a text"):
            llm.generate([prompt])
    stream = llm.stream("add 1 and 2", max_tokens=5, ignore_eos=True)
    next(stream)
    with pytest.raises(Refused, match="still being streamed"):
        llm.generate("x")
    rest = list(stream)
    assert rest and llm.generate("x", max_tokens=1)
