"""Answers with a form: JSON by a schema, calls of tools; and answers that come back in a conversation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heliostat.engine.engine import Piece
from tests.unit.serve.conftest import KEYS, TOOL, Served, Serving, bearer, engine_of, run

SCHEMA = {
    "type": "object",
    "properties": {"sum": {"enum": [1, 22, 333]}, "sure": {"type": "boolean"}},
    "required": ["sum", "sure"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
FREE: dict[str, Any] = {"max_tokens": 200, "ignore_eos": False}


def fits(text: str) -> bool:
    found = json.loads(text)
    return set(found) == {"sum", "sure"} and found["sum"] in (1, 22, 333) and isinstance(found["sure"], bool)


def test_an_answer_fits_its_schema(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            brief = {**FREE, "logit_bias": served.without(str.isspace)}
            reply = await served.chat(response_format=FORMAT, n=3, temperature=1, seed=5, **brief)
            assert all(fits(choice["message"]["content"]) for choice in reply["choices"])
            assert {choice["finish_reason"] for choice in reply["choices"]} == {"stop"}
            events = await served.stream(response_format=FORMAT, model="plan", **brief)
            assert fits("".join(e["choices"][0]["delta"].get("content", "") for e in events[:-1]))
            text = await served.post(
                "/v1/completions", model="math", prompt="add", response_format=FORMAT, **brief
            )
            assert fits(text["choices"][0]["text"])
            plain = await served.chat(response_format={"type": "text"})
            assert plain["choices"] == (await served.chat())["choices"]

    run(work())


@pytest.mark.parametrize(
    ("wanted", "status"),
    [
        ({"type": "yaml"}, 422),
        ({"type": "json_schema"}, 400),
        ({"type": "json_schema", "json_schema": {"schema": "x"}}, 400),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "wizard"}}}, 400),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "array", "minItems": 10**9}}}, 400),
        ({"type": "json_schema", "json_schema": {"schema": {"description": "x" * 10**6}}}, 400),
    ],
)
def test_a_schema_that_is_wrong_names_the_field(serving: Serving, wanted: Any, status: int) -> None:
    async def work() -> None:
        async with serving() as served:
            error = (await served.chat(status=status, response_format=wanted, ignore_eos=False))["error"]
            assert error["param"].startswith("response_format")
            assert served.service.in_flight == 0

    run(work())


def test_a_required_call_is_one(serving: Serving, tool_family: Path) -> None:
    async def work() -> None:
        async with serving(family=tool_family) as served:
            brief = {**FREE, "logit_bias": served.without(str.isspace)}
            named = {"type": "function", "function": {"name": "add"}}
            for choice in ("required", named):
                reply = (await served.chat(tools=[TOOL], tool_choice=choice, **brief))["choices"][0]
                (call,) = reply["message"]["tool_calls"]
                assert call["type"] == "function" and call["function"]["name"] == "add"
                arguments = json.loads(call["function"]["arguments"])
                assert arguments["a"] in (1, 2, 3) and arguments["b"] in (4, 5)
                assert reply["message"]["content"] is None and reply["finish_reason"] == "tool_calls"
            events = await served.stream(tools=[TOOL], tool_choice="required", **brief)
            (only,) = [event["choices"][0] for event in events[:-1]]
            assert only["delta"]["tool_calls"][0]["index"] == 0 and only["delta"]["role"] == "assistant"
            assert only["finish_reason"] == "tool_calls" and "content" not in only["delta"]
            turns = [
                {"role": "user", "content": "add"},
                {"role": "assistant", "content": None, "tool_calls": reply["message"]["tool_calls"]},
                {"role": "tool", "tool_call_id": call["id"], "content": "6"},
            ]
            await served.chat(messages=turns, tools=[TOOL])

    run(work())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"function": {"name": "sub"}}}, "tool_choice"),
        ({"tools": [TOOL], "response_format": FORMAT}, "response_format"),
    ],
)
def test_choices_of_tools_that_are_refused(
    serving: Serving, tool_family: Path, fields: dict[str, Any], param: str
) -> None:
    async def work() -> None:
        async with serving(family=tool_family) as served:
            assert (await served.chat(status=400, **fields))["error"]["param"] == param

    run(work())


def scripted(served: Served, pieces: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine says these texts instead of its own."""
    engine = engine_of(served.service)
    step, left = engine.step, list(pieces)

    def said() -> list[Piece]:
        return [replace(p, text=left.pop(0) if left else "") for p in step()]

    monkeypatch.setattr(engine, "step", said)


def test_calls_among_text_are_found_in_streams_too(
    serving: Serving, tool_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = ["I ", "add.<tool", '_call>{"name": "add", ', '"arguments": {"a": 1}}</tool_call>', "", ""]

    async def work() -> None:
        async with serving(family=tool_family) as served:
            for stream in (False, True):
                scripted(served, pieces, monkeypatch)
                fields: dict[str, Any] = {"tools": [TOOL], "max_tokens": 6}
                if not stream:
                    message = (await served.chat(**fields))["choices"][0]["message"]
                    assert message["content"] == "I add."
                    (call,) = message["tool_calls"]
                else:
                    deltas = [e["choices"][0]["delta"] for e in (await served.stream(**fields))[:-1]]
                    assert "".join(d.get("content", "") for d in deltas) == "I add."
                    ((call,),) = [d["tool_calls"] for d in deltas if "tool_calls" in d]
                assert call["function"] == {"name": "add", "arguments": '{"a": 1}'}
                monkeypatch.undo()

    run(work())


def test_an_answer_that_comes_back_is_found_under_the_same_key_alone(
    serving: Serving, keys_file: Path
) -> None:
    async def work() -> None:
        async with serving(keys=keys_file) as served:
            alice, bob, root = KEYS
            plain = served.without(lambda word: not word.isascii() or "<" in word)
            asked = {"role": "user", "content": "one two three"}
            for key, spliced in ((alice, 1), (bob, 1)):
                reply = await served.chat(
                    messages=[asked], model="code", key=alice, max_tokens=40, logit_bias=plain
                )
                said = reply["choices"][0]["message"]
                await served.chat(messages=[asked, said, asked], model="code", key=key, max_tokens=2)
                assert served.service.remembered.recalls.spliced == spliced
            text = (await served.client.get("/metrics", headers=bearer(root))).text
            assert 'heliostat_recalled_answers_total{outcome="looked_up"} 2.0' in text

    run(work())
