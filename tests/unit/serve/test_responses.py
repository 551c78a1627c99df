"""/v1/responses: inputs read as conversations, refusals by the names used there."""

from typing import Any

import pytest

from heliostat.serve.dialect import parse
from heliostat.serve.responses import ResponsesAsking, turns_of
from heliostat.serve.trouble import Trouble
from tests.unit.serve.conftest import Serving, run

CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}


def asking(**fields: Any) -> ResponsesAsking:
    return ResponsesAsking.model_validate({"model": "base", "input": "add", **fields})


def test_items_become_turns_and_calls_belong_to_the_answer_before_them() -> None:
    turns = turns_of(
        [
            {"role": "developer", "content": "be brief"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "add"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "so", "annotations": []}]},
            CALL,
            {**CALL, "call_id": "c2"},
            {"type": "function_call_output", "call_id": "c1", "output": "6"},
            CALL,
        ]
    )
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "tool", "assistant"]
    assert turns[2]["content"] == "so" and [c["id"] for c in turns[2]["tool_calls"]] == ["c1", "c2"]
    assert turns[3] == {"role": "tool", "tool_call_id": "c1", "content": "6"}
    assert turns[4]["content"] == "" and len(turns[4]["tool_calls"]) == 1


def test_everything_reaches_the_conversation() -> None:
    schema = {"type": "object"}
    chat = asking(
        instructions="be brief",
        max_output_tokens=7,
        temperature=0,
        top_p=0.5,
        seed=3,
        user="u",
        stream=True,
        text={"format": {"type": "json_schema", "name": "one", "schema": schema, "strict": True}},
        tools=[{"type": "function", "name": "add", "parameters": schema, "strict": None}],
        tool_choice={"type": "function", "name": "add"},
    ).chat()
    assert [m.role for m in chat.messages] == ["system", "user"]
    assert (chat.most_tokens, chat.temperature, chat.top_p, chat.seed) == (7, 0, 0.5, 3)
    assert chat.stream and chat.user == "u"
    assert chat.response_format is not None and (chat.response_format.json_schema or {})["schema"] == schema
    assert chat.tools and chat.tools[0].function.name == "add"
    assert chat.tool_choice == {"type": "function", "function": {"name": "add"}}
    bare = asking().chat()
    assert bare.response_format is None and bare.tools is None and bare.most_tokens is None


def test_what_clients_send_unasked_is_taken_without_a_word() -> None:
    body = b"""{"model": "base", "input": "add", "store": true, "previous_response_id": null, "include": [],
        "truncation": "disabled", "reasoning": null, "metadata": {"a": "b"}, "prompt_cache_key": "k",
        "parallel_tool_calls": true, "stream_options": {"include_obfuscation": false}}"""
    found, unknown = parse(ResponsesAsking, body)
    assert unknown == [] and found.chat().messages


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ({"conversation": "conv_1"}, 400, "conversation"),
        ({"background": True}, 400, "background"),
        ({"reasoning": {"effort": "high"}}, 400, "reasoning"),
        ({"truncation": "auto"}, 400, "truncation"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"input": []}, 400, "input"),
        ({"input": 3}, 422, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, 400, "input.0"),
        ({"input": [{"role": "wizard", "content": "a"}]}, 400, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input.0.content"),
        ({"input": [{"role": "user", "content": 3}]}, 400, "input.0.content"),
        ({"input": [{**CALL, "arguments": "{"}]}, 400, "input.0"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools.0"),
        ({"tools": [{"type": "function"}]}, 400, "tools.0.name"),
        ({"tool_choice": {"type": "allowed_tools"}}, 400, "tool_choice"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "wizard"}}}}, 400, "text.format"),
    ],
)
def test_what_is_refused_is_named_as_it_is_called_here(
    serving: Serving, fields: dict[str, Any], status: int, param: str
) -> None:
    async def work() -> None:
        async with serving() as served:
            body = {"model": "base", "input": "add", **fields}
            error = (await served.post("/v1/responses", status, **body))["error"]
            assert error["param"] == param and "response_format" not in error["message"]
            assert served.service.in_flight == 0

    run(work())


def test_nothing_is_kept_to_be_looked_up(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            reply = await served.post("/v1/responses", model="base", input="add", max_output_tokens=2)
            assert reply["store"] is False
            await served.get(f"/v1/responses/{reply['id']}", 404)

    run(work())


def test_a_call_without_a_name_is_no_tool() -> None:
    with pytest.raises(Trouble, match="needs a name"):
        asking(tools=[{"type": "function"}]).chat()
