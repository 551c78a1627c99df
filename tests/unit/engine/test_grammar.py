"""Answers by a schema: whatever the logits, what is said parses and fits; what cannot be kept is refused."""

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.build import Loaded
from heliostat.engine.engine import Engine
from heliostat.engine.grammar import ANY_OBJECT, SCHEMA_BYTES, SCHEMA_DEPTH, SCHEMA_REPEATS, Grammars
from heliostat.engine.request import Request, Sampling
from heliostat.engine.sampler import Draw, sample
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.llm import LLM
from heliostat.model.config import read_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.weights import load_transformer

PERSON: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.load(tiny_base)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer)


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Loaded:
    return Loaded(
        "base", "d", "base", load_transformer(tiny_base, read_config(tiny_base), dtype=torch.float32)
    )


def is_person(found: Any) -> bool:
    """A judge apart from what made the grammar."""
    return (
        list(found) == ["name", "age", "kind", "tags"]
        and isinstance(found["name"], str)
        and len(found["name"]) <= 6
        and type(found["age"]) is int
        and 0 <= found["age"] <= 150
        and found["kind"] in ("a", "b", None)
        and isinstance(found["tags"], list)
        and all(type(tag) is bool for tag in found["tags"])
        and len(found["tags"]) <= 3
    )


def spoken(grammars: Grammars, schema: Mapping[str, Any], eos: int, chance: Any, **options: Any) -> list[int]:
    """An answer out of random logits, through the sampler alone; the end token included where one was chosen."""
    sampling = Sampling(**{"max_tokens": 200, **options})
    matcher = grammars.matcher(schema)
    answer: list[int] = []
    while len(answer) < sampling.max_tokens:
        logits = torch.randn(1, 300, generator=chance) * 8
        (found,) = sample(logits, [Draw(sampling, answer, (eos,), matcher.allowed(answer))])
        answer.append(found.token)
        if found.token == eos:
            break
    return answer


@given(
    seed=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 1.0, 5.0]),
    min_tokens=st.integers(0, 60),
    biased=st.booleans(),
)
@settings(max_examples=60)
def test_whatever_the_logits_an_answer_that_ends_fits(
    seed: int, temperature: float, min_tokens: int, biased: bool, grammars: Grammars, tokenizer: Tokenizer
) -> None:
    (eos,) = tokenizer.eos_ids
    bias = dict.fromkeys(tokenizer.encode('{"}:,'), -100.0) | {eos: 100.0} if biased else {}
    options = {"temperature": temperature, "min_tokens": min_tokens, "logit_bias": bias, "seed": seed}
    answer = spoken(grammars, PERSON, eos, torch.Generator().manual_seed(seed), **options)
    if answer[-1] == eos:
        assert is_person(json.loads(tokenizer.decode(answer)))
    else:
        assert len(answer) == 200


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20)
def test_any_object_is_an_object(seed: int, grammars: Grammars, tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_ids
    close = dict.fromkeys(tokenizer.encode('"}]'), 15.0)  # else random strings go on for ever
    answer = spoken(grammars, ANY_OBJECT, eos, torch.Generator().manual_seed(seed), logit_bias=close)
    assert answer[-1] != eos or isinstance(json.loads(tokenizer.decode(answer)), dict)
    assert tokenizer.decode(answer).startswith("{")


def bits(allowed: bytes) -> set[int]:
    return {token for token in range(len(allowed) * 8) if allowed[token // 8] >> token % 8 & 1}


def test_the_end_is_allowed_exactly_where_the_grammar_accepts(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    (eos,) = tokenizer.eos_ids
    matcher = grammars.matcher({"enum": [1, 12]})
    one, two = tokenizer.encode("1"), tokenizer.encode("2")
    assert eos not in bits(matcher.allowed([]))
    assert {eos, *two} <= bits(matcher.allowed(one))
    assert bits(matcher.allowed([*one, *two])) == {eos}


def test_asking_twice_advances_once_and_every_matcher_is_its_own(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode('{"name": "x"')
    one, two = grammars.matcher(PERSON), grammars.matcher(PERSON)
    steps = [one.allowed(ids[:n]) for n in range(len(ids) + 1)]
    assert [one.allowed(ids), two.allowed([])] == [steps[-1], steps[0]]
    assert two.allowed(ids) == steps[-1]  # all at once is one by one
    with pytest.raises(Refused, match="cannot go on by its schema"):
        grammars.matcher(PERSON).allowed(tokenizer.encode("no"))


def test_one_mask_for_all_rows_and_none_for_the_others() -> None:
    logits = torch.arange(20.0).repeat(3, 1)
    few = Draw(Sampling(), (), (0,), bytes([0b0001_0010, 0, 0]))
    short = Draw(Sampling(), (), (0,), bytes([0, 0b1, 0]))
    found = sample(logits, [few, Draw(Sampling(logprobs=1), (), (0,)), short])
    assert [s.token for s in found] == [4, 19, 8]
    # Above the tokenizer's last id nothing is allowed; a wish for or against a token changes that as little.
    wish = Sampling(logit_bias={1: -100.0, 4: -100.0, 15: 100.0}, temperature=3.0)
    assert sample(logits[:1], [Draw(wish, (), (0,), bytes([0b0001_0010]))])[0].token in (1, 4)


def ask(
    engine: Engine, grammars: Grammars, number: int, schema: Mapping[str, Any] | None, **options: Any
) -> Request:
    return Request(
        str(number),
        row=Row("base", "base", "base", "base"),
        digests={"base": engine.digests["base"]},
        prompt=tuple(random.Random(number).choices(range(10, 250), k=5)),
        sampling=Sampling(**{"max_tokens": 60, "temperature": 1.5, "seed": number, **options}),
        matcher=None if schema is None else grammars.matcher(schema),
    )


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    for request in requests:
        engine.add(request)
    while engine.unfinished:
        engine.step()
    return [request.answer for request in requests]


def test_company_and_preemption_change_no_answer_by_a_schema(
    base: Loaded, tokenizer: Tokenizer, grammars: Grammars
) -> None:
    def crowd(engine: Engine) -> list[Request]:
        schemas = [PERSON, None, {"enum": ["yes", "no"]}]
        return [ask(engine, grammars, n, schemas[n % 3], min_tokens=n) for n in range(12)]

    def engine(pages: int) -> Engine:
        return Engine({"base": base}, tokenizer, max_length=80, pages=pages, page_size=4)

    large, small = engine(400), engine(24)
    alone = [answers(large, [request])[0] for request in crowd(large)]
    crowded = crowd(small)
    assert answers(small, crowded) == alone
    assert sum(request.preemptions for request in crowded if request.matcher) > 3
    for request in crowded[::3]:
        if request.finish_reason == "stop":
            assert is_person(json.loads(tokenizer.decode(request.answer)))
    for request in crowded[2::3]:  # shorter than min_tokens: the grammar ends it all the same
        assert (
            json.loads(tokenizer.decode(request.answer)) in ("yes", "no") and request.finish_reason == "stop"
        )


def test_n_answers_to_one_prompt_differ_and_all_fit(
    base: Loaded, tokenizer: Tokenizer, grammars: Grammars
) -> None:
    engine = Engine({"base": base}, tokenizer, max_length=256, pages=400, page_size=4)
    schema = {"type": "integer", "minimum": 10_000, "maximum": 99_999}
    requests = [ask(engine, grammars, 3, schema, choice=choice) for choice in range(6)]
    for number, request in enumerate(requests):
        request.id = str(number)
    said = [json.loads(tokenizer.decode(ids)) for ids in answers(engine, requests)]
    assert len(set(said)) > 1 and all(10_000 <= number <= 99_999 for number in said)


class Stuck:
    def allowed(self, answer: Any) -> bytes:
        raise Refused("stuck")


def test_a_grammar_that_is_stuck_ends_its_request_and_no_other(
    base: Loaded, tokenizer: Tokenizer, grammars: Grammars
) -> None:
    engine = Engine({"base": base}, tokenizer, max_length=80, pages=99, page_size=4)
    good, bad = ask(engine, grammars, 0, PERSON), ask(engine, grammars, 1, None)
    (want,) = answers(engine, [ask(engine, grammars, 0, PERSON)])
    bad.matcher = Stuck()
    engine.add(good)
    engine.step()
    engine.add(bad)
    with pytest.raises(Refused, match="stuck"):
        engine.step()
    assert bad.finish_reason == "abort" and answers(engine, []) == [] and good.answer == want
    assert engine.table.available() == 99


def test_a_grammar_and_no_end_are_refused_together(grammars: Grammars) -> None:
    with pytest.raises(Refused, match="ignore_eos"):
        Request(
            "x",
            row=Row("b", "b", "b", "b"),
            digests={},
            prompt=(1,),
            sampling=Sampling(ignore_eos=True),
            matcher=grammars.matcher(PERSON),
        )


def nested(levels: int) -> Any:
    schema: Any = {}
    for _ in range(levels):
        schema = {"items": schema}
    return {"type": "array", **schema}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"enum": ["x" * SCHEMA_BYTES]}, rf"bytes; allowed are {SCHEMA_BYTES}"),
        (nested(SCHEMA_DEPTH + 1), rf"levels; allowed are {SCHEMA_DEPTH}"),
        (nested(100_000), "no JSON"),
        ({"type": "array", "maxItems": 10**9}, rf"1000000000 repetitions; allowed are {SCHEMA_REPEATS}"),
        ({"anyOf": [{"type": "array", "minItems": SCHEMA_REPEATS / 2}] * 3}, "15000 repetitions"),
        ({"type": "string", "pattern": "(a"}, "the schema is refused"),
        ({"type": "nonsense"}, "Invalid type: nonsense"),
        ({"not": {}}, "Unimplemented keys"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "Unimplemented keys"),
        ({"$ref": "http://127.0.0.1:9/schema"}, "refused"),
        ({"$ref": "file:///etc/hosts"}, "refused"),
        ({"enum": [float("nan")]}, "no JSON"),
        ({"enum": [object()]}, "no JSON"),
        ("object", "a schema is a JSON object"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused(schema: Any, message: str, grammars: Grammars) -> None:
    with pytest.raises(Refused, match=message) as found:
        grammars.matcher(schema)
    assert "backtrace" not in str(found.value) and "\n" not in str(found.value)


def test_a_schema_is_compiled_once_while_it_is_among_the_last(tokenizer: Tokenizer) -> None:
    grammars, compiled = Grammars(tokenizer, kept=2), []
    whole = grammars._compile
    grammars._compile = lambda text: compiled.append(text) or whole(text)  # type: ignore[func-returns-value, method-assign]
    for value in (1, 1, 2, 1, 3, 1, 2):
        grammars.matcher({"enum": [value]})
    assert [json.loads(text)["enum"][0] for text in compiled] == [1, 2, 3, 2]
    assert len(grammars._compiled) == 2


def test_a_schema_that_is_refused_is_compiled_once_too(tokenizer: Tokenizer) -> None:
    grammars, compiled = Grammars(tokenizer), []
    whole = grammars._compile
    grammars._compile = lambda text: compiled.append(text) or whole(text)  # type: ignore[func-returns-value, method-assign]
    for _ in range(3):
        with pytest.raises(Refused, match="Invalid type: nonsense"):
            grammars.matcher({"type": "nonsense"})
    assert len(compiled) == 1


def test_without_the_library_the_extra_is_named(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(Refused, match=r"heliostat\[structured\]"):
        Grammars(tokenizer)


def test_the_offline_face_takes_a_schema(tiny_family: Path) -> None:
    llm = LLM(tiny_family, members=["math", "plan"], dtype="float32")
    schema = {"type": "object", "properties": {"sum": {"enum": [1, 2]}}, "required": ["sum"]}
    schema["additionalProperties"] = False  # type: ignore[assignment]
    found = llm.generate(["add 1 and 1"] * 4, member=["math", "plan"] * 2, schema=schema, max_tokens=80)
    assert all(json.loads(a.text)["sum"] in (1, 2) for a in found if a.finish_reason == "stop")
    assert any(a.finish_reason == "stop" for a in found)
    text = "".join(llm.stream("add 1 and 1", member="math", schema=schema, max_tokens=80))
    assert text == found[0].text
