"""What /v1/responses answers: one output, told whole and as events that add up to it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from heliostat.errors import Refused
from heliostat.serve.keys import OPEN
from heliostat.serve.responding import events, taken_in
from heliostat.serve.responses import ResponsesAsking
from tests.unit.serve.conftest import Pace, Served, Serving, engine_of, leaving, run, until
from tests.unit.serve.test_forms import scripted

TOOL: dict[str, Any] = {
    "type": "function",
    "name": "add",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
}
ASKED: dict[str, Any] = {"model": "base", "input": "add 2 and 3", "temperature": 0, "ignore_eos": True}


async def ask(served: Served, **fields: Any) -> Any:
    return await served.post("/v1/responses", **{**ASKED, "max_output_tokens": 8, **fields})


async def told(served: Served, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each under the name that it has."""
    body = {**ASKED, "max_output_tokens": 8, "stream": True, **fields}
    reply = await served.client.post("/v1/responses", json=body)
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
    *events, end = reply.text.split("\n\n")
    assert end == ""
    found = []
    for event in events:
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def steady(response: dict[str, Any]) -> Any:
    """What of an output does not change from one asking to the next."""
    forget = ("id", "call_id")
    return [{k: v for k, v in item.items() if k not in forget} for item in response["output"]]


def test_an_answer_is_the_conversations_whole_and_as_events(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            chat = await served.chat(model="plan")
            reply = await ask(served, model="plan")
            (item,) = reply["output"]
            assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
            assert reply["status"] == item["status"] == "incomplete"
            assert reply["incomplete_details"] == {"reason": "max_output_tokens"}
            assert reply["object"] == "response" and reply["id"].startswith("resp_")
            assert reply["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
            assert reply["usage"]["output_tokens"] == 8 and reply["usage"]["total_tokens"] > 8
            events = await told(served, model="plan")
            kinds = [event["type"].removeprefix("response.") for event in events]
            assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
            assert kinds[-4:] == [
                "output_text.done",
                "content_part.done",
                "output_item.done",
                "incomplete",
            ]
            assert set(kinds[4:-4]) == {"output_text.delta"}
            assert "".join(e["delta"] for e in events[4:-4]) == item["content"][0]["text"]
            assert steady(events[-1]["response"]) == steady(reply)
            assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None

    run(work())


def test_pages_of_another_member_are_told_as_cached(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            long = "one two three four five six seven " * 3
            await ask(served, input=long, model="code")
            usage = (await ask(served, input=long, model="plan"))["usage"]
            found = usage["input_tokens_details"]
            assert found["cached_tokens"] >= 16
            assert found["cached_tokens"] + found["cache_write_tokens"] == usage["input_tokens"]

    run(work())


def test_an_answer_that_comes_back_is_found(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            one = await ask(served)
            turns = [{"role": "user", "content": ASKED["input"]}, *one["output"]]
            await ask(served, input=[*turns, {"role": "user", "content": "and 4"}])
            assert served.service.remembered.recalls.spliced == 1

    run(work())


def test_an_answer_by_a_schema(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            form = {"type": "json_schema", "name": "one", "schema": {"enum": ["red", "blue"]}}
            fields = {"text": {"format": form}, "ignore_eos": False, "max_output_tokens": 60}
            reply = await ask(served, **fields)
            assert json.loads(reply["output"][0]["content"][0]["text"]) in ("red", "blue")
            assert reply["status"] == "completed" and reply["text"]["format"]["schema"] == form["schema"]

    run(work())


def test_calls_among_text_are_items_of_their_own(
    serving: Serving, tool_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = ["I ", "add.<tool", '_call>{"name": "add", ', '"arguments": {"a": 1}}</tool_call>', " So.", ""]

    async def work() -> None:
        async with serving(family=tool_family) as served:
            fields: dict[str, Any] = {"tools": [TOOL], "max_output_tokens": 6}
            scripted(served, pieces, monkeypatch)
            reply = await ask(served, **fields)
            text, call, more = reply["output"]
            assert text["content"][0]["text"] == "I add." and text["status"] == "completed"
            assert call["name"] == "add" and json.loads(call["arguments"]) == {"a": 1}
            assert call["type"] == "function_call" and call["call_id"].startswith("call_")
            assert more["content"][0]["text"] == " So." and more["status"] == "incomplete"
            scripted(served, pieces, monkeypatch)
            events = await told(served, **fields)
            assert steady(events[-1]["response"]) == steady(reply)
            done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
            assert done == events[-1]["response"]["output"]
            (said,) = [e for e in events if e["type"] == "response.function_call_arguments.done"]
            assert (said["output_index"], said["name"]) == (1, "add")

    run(work())


def test_a_required_call_and_what_came_of_it(serving: Serving, tool_family: Path) -> None:
    async def work() -> None:
        async with serving(family=tool_family) as served:
            fields: dict[str, Any] = {"tools": [TOOL], "tool_choice": "required", "ignore_eos": False}
            reply = await ask(served, max_output_tokens=200, **fields)
            (call,) = reply["output"]
            assert call["type"] == "function_call" and call["name"] == "add"
            assert reply["status"] == "completed"
            turns = [{"role": "user", "content": "add"}, call]
            turns.append({"type": "function_call_output", "call_id": call["call_id"], "output": "6"})
            assert (await ask(served, input=turns, tools=[TOOL]))["output"]

    run(work())


def test_an_error_in_the_middle_is_an_event(serving: Serving) -> None:
    async def work() -> None:
        async with serving(deadline=0.05) as served:
            pace = Pace(engine_of(served.service), steps=3)
            events = await told(served, max_output_tokens=100)
            failed = events[-1]
            assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
            assert failed["response"]["error"]["code"] == "deadline"
            pace.left = 100
            assert served.service.in_flight == 0

    run(work())


def test_a_refusal_in_the_middle_is_an_event(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            asking = ResponsesAsking(**ASKED)
            job = await taken_in(served.service, asking, OPEN)
            job.asked.inbox.put_nowait(Refused("a prompt of 9 tokens has no room"))
            last = [frame async for frame in events(job, asking)][-1]
            assert last.startswith(b"event: response.failed") and b"a prompt of 9 tokens" in last

    run(work())


def test_a_client_that_leaves_ends_its_request(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            for stream in (False, True):
                gone = asyncio.Event()
                body = {**ASKED, "max_output_tokens": 200, "stream": stream}
                asked = asyncio.create_task(leaving(served.app, "/v1/responses", body, gone))
                await until(lambda: served.service.dispatcher.unfinished == 1)
                gone.set()
                await asked
                assert served.service.in_flight == served.service.dispatcher.unfinished == 0
                assert await served.held() == 0

    run(work())
