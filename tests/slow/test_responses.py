"""The official client's ``responses``, unchanged, against a real server: whole, streamed, async, tools, JSON."""

import asyncio
import json
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from heliostat.build import init_family
from tests.slow.process import served
from tests.unit.serve.conftest import TOOLS_TEMPLATE

pytestmark = pytest.mark.slow

ASKED: Any = {"model": "math", "input": "add 2 and 3", "max_output_tokens": 8, "temperature": 0}
TOOL: Any = {
    "type": "function",
    "name": "pick",
    "description": "Picks.",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
    "strict": True,
}


class Colour(BaseModel):
    """What an answer is held to."""

    name: Literal["red", "blue"]


def test_whole_streamed_and_async_are_the_same(client: openai.OpenAI, address: str) -> None:
    whole = client.responses.create(**ASKED)
    assert whole.usage is not None and whole.usage.input_tokens_details.cached_tokens >= 0
    assert whole.output_text or whole.status == "completed"
    chat = client.chat.completions.create(
        model="math", messages=[{"role": "user", "content": ASKED["input"]}], max_tokens=8, temperature=0
    )
    assert whole.output_text == chat.choices[0].message.content
    stream = client.responses.create(**ASKED, stream=True)
    events = list(stream)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == whole.output_text

    async def later() -> str:
        async with openai.AsyncOpenAI(base_url=address, api_key="none") as client:
            replies = await asyncio.gather(*(client.responses.create(**ASKED) for _ in range(4)))
            assert {reply.output_text for reply in replies} == {whole.output_text}
            found = await client.responses.create(**ASKED, stream=True)
            return "".join([e.delta async for e in found if e.type == "response.output_text.delta"])

    assert asyncio.run(later()) == whole.output_text


def test_the_clients_own_accumulation(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "name": "one", "schema": {"enum": ["red", "blue"]}}
    asked: Any = {"model": "plan", "input": "which?", "temperature": 0, "text": {"format": form}}
    with client.responses.stream(**asked) as stream:
        texts = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert json.loads(final.output_text) in ("red", "blue") and texts[-1] == final.output_text


def test_json_schema_as_a_class(client: openai.OpenAI) -> None:
    reply = client.responses.parse(model="plan", input="which?", text_format=Colour)
    assert reply.output_parsed is not None and reply.output_parsed.name in ("red", "blue")


def test_a_conversation_goes_on(client: openai.OpenAI) -> None:
    one = client.responses.create(**ASKED, instructions="Be brief.")
    assert client.responses.create(**ASKED, store=True, instructions="Be brief.").output_text
    turns: Any = [{"role": "user", "content": ASKED["input"]}, *one.output]
    more = client.responses.create(
        **{**ASKED, "input": [*turns, {"role": "user", "content": "and 4"}]}, instructions="Be brief."
    )
    assert more.usage is not None and more.usage.input_tokens_details.cached_tokens >= 16
    with pytest.raises(openai.BadRequestError) as kept:
        client.responses.create(**ASKED, previous_response_id=one.id)
    assert kept.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(one.id)


def test_tools(make_checkpoint: Any, tmp_path: Path) -> None:
    base = make_checkpoint(seed=4)
    (base / "chat_template.jinja").write_text(TOOLS_TEMPLATE, encoding="utf-8")
    init_family(tmp_path / "fam", base)
    with served(tmp_path / "fam", "--cache-mib", "16") as (found, _):
        with openai.OpenAI(base_url=f"{found}/v1", api_key="none") as client:
            asked: Any = {"model": "base", "input": "pick", "tools": [TOOL], "tool_choice": "required"}
            reply = client.responses.create(**asked)
            call = reply.output[0]
            assert call.type == "function_call" and call.name == "pick" and json.loads(call.arguments) == {}
            with client.responses.stream(**asked) as stream:
                kinds = [event.type for event in stream]
                final = stream.get_final_response()
            assert "response.function_call_arguments.done" in kinds
            assert final.output[0].type == "function_call"
            turns: Any = [{"role": "user", "content": "pick"}, call]
            turns.append({"type": "function_call_output", "call_id": call.call_id, "output": "red"})
            more = client.responses.create(model="base", input=turns, tools=[TOOL], max_output_tokens=4)
            assert more.output
