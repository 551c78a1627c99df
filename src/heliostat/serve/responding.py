"""An answer as /v1/responses tells it: items of an output, whole or as events. Both come of the same steps."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from typing import Any

from heliostat.errors import Refused
from heliostat.serve.answering import packed
from heliostat.serve.keys import Tenant
from heliostat.serve.responses import ResponsesAsking, renamed
from heliostat.serve.service import Job, Service
from heliostat.serve.speaking import Told, usage_of
from heliostat.serve.tools import Call
from heliostat.serve.trouble import Trouble, trouble_of

Event = dict[str, Any]


async def taken_in(service: Service, asking: ResponsesAsking, tenant: Tenant) -> Job:
    """Take a request in, as the conversation that it is."""
    try:
        return await service.chat(asking.chat(), tenant)
    except Trouble as trouble:
        raise renamed(trouble) from None


@dataclass(slots=True)
class Output:
    """The items of an answer while it is spoken; every step gives the events that tell of it."""

    id: str
    items: list[dict[str, Any]] = field(default_factory=list)
    _open: bool = False
    """Whether the last item is a message that may go on."""

    def hear(self, told: Told) -> Iterator[Event]:
        """Text goes on with the message that is open, or begins one; calls are whole."""
        if told.text or not (told.calls or self.items):
            if not self._open:
                yield from self._begin()
            if told.text:
                self.items[-1]["content"][0]["text"] += told.text
                yield self._of_text("response.output_text.delta", delta=told.text, logprobs=[])
        for _, call in told.calls:
            yield from self._close("completed")
            yield from self._call(call)
        if told.reason is not None:
            yield from self._close("incomplete" if told.reason == "length" else "completed")

    def _begin(self) -> Iterator[Event]:
        message = {"id": self._name("msg"), "type": "message", "role": "assistant", "status": "in_progress"}
        self.items.append({**message, "content": []})
        yield self._of_item("response.output_item.added", item={**message, "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items[-1]["content"].append(part)
        self._open = True
        yield self._of_text("response.content_part.added", part=dict(part))

    def _close(self, status: str) -> Iterator[Event]:
        if not self._open:
            return
        self._open = False
        item = self.items[-1]
        item["status"], part = status, item["content"][0]
        yield self._of_text("response.output_text.done", text=part["text"], logprobs=[])
        yield self._of_text("response.content_part.done", part=dict(part))
        yield self._of_item("response.output_item.done", item=item)

    def _call(self, call: Call) -> Iterator[Event]:
        item = {"id": self._name("fc"), "type": "function_call", "call_id": call.id, "name": call.name}
        self.items.append({**item, "arguments": call.arguments, "status": "completed"})
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._of_item("response.output_item.added", item=begun)
        place = self._place()
        yield {"type": "response.function_call_arguments.delta", **place, "delta": call.arguments}
        said = {"arguments": call.arguments, "name": call.name}
        yield {"type": "response.function_call_arguments.done", **place, **said}
        yield self._of_item("response.output_item.done", item=self.items[-1])

    def _name(self, kind: str) -> str:
        return f"{kind}_{self.id}-{len(self.items)}"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _of_text(self, kind: str, **facts: Any) -> Event:
        return {"type": kind, **self._place(), "content_index": 0, **facts}

    def _of_item(self, kind: str, *, item: dict[str, Any]) -> Event:
        return {"type": kind, "output_index": len(self.items) - 1, "item": item}


async def whole(job: Job, asking: ResponsesAsking) -> dict[str, Any]:
    """The answer when it has ended."""
    last: dict[str, Any] = {}
    try:
        async for event in _told(job, asking, Output(_bare(job))):
            last = event
        return dict(last["response"])
    finally:
        job.finish()


async def events(job: Job, asking: ResponsesAsking) -> AsyncGenerator[bytes, None]:
    """The answer as it comes. Whatever ends this generator ends the job."""
    number, output = 0, Output(_bare(job))
    try:
        async for event in _told(job, asking, output):
            yield _packed(event, number)
            number += 1
    except (Trouble, Refused) as found:
        trouble = trouble_of(found) if isinstance(found, Refused) else found
        error = {"code": trouble.code or "server_error", "message": trouble.message}
        failed = {**_response(job, asking, output, "failed"), "error": error}
        yield _packed({"type": "response.failed", "response": failed}, number)
    finally:
        job.finish()


async def _told(job: Job, asking: ResponsesAsking, output: Output) -> AsyncGenerator[Event, None]:
    """Every event of an answer; the last holds all of it. Raises Trouble where it cannot be told to its end."""
    for kind in ("response.created", "response.in_progress"):
        yield {"type": kind, "response": _response(job, asking, output, "in_progress")}
    async for place, piece in job.asked.pieces():
        told = job.voices[place].hear(piece)
        if told is not None:
            for event in output.hear(told):
                yield event
    await job.service.remember(job)  # before the end is told: the next turn may come at once
    status = "incomplete" if job.voices[0].reason == "length" else "completed"
    yield {"type": f"response.{status}", "response": _response(job, asking, output, status)}


def _packed(event: Event, number: int) -> bytes:
    name = event["type"].encode()
    return b"event: " + name + b"\ndata: " + packed({**event, "sequence_number": number}) + b"\n\n"


def _bare(job: Job) -> str:
    return job.id.rpartition("-")[2]


def _response(job: Job, asking: ResponsesAsking, output: Output, status: str) -> dict[str, Any]:
    """The response object: what was asked, and what has been answered of it."""
    ended = status in ("completed", "incomplete")
    form = asking.text.format if asking.text else None
    said = asking.model_dump(include={"instructions", "max_output_tokens", "metadata", "top_p", "user"})
    return {
        **said,
        "id": f"resp_{_bare(job)}",
        "object": "response",
        "created_at": job.created,
        "completed_at": int(time.time()) if status == "completed" else None,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": asking.model,
        "output": [dict(item) for item in output.items],
        "metadata": asking.metadata or {},
        "parallel_tool_calls": asking.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "system_fingerprint": f"{job.version.name}-{job.version.fingerprint}",
        "temperature": 1.0 if asking.temperature is None else asking.temperature,
        "top_p": 1.0 if asking.top_p is None else asking.top_p,
        "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
        "tool_choice": asking.tool_choice or "auto",
        "tools": [tool.model_dump() for tool in asking.tools or ()],
        "truncation": "disabled",
        "usage": _usage(job) if ended else None,
    }


def _usage(job: Job) -> dict[str, Any]:
    found = usage_of(job.asked.requests, choices=1)
    cached = found["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": found["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": cached,
            "cache_write_tokens": found["prompt_tokens"] - cached,
        },
        "output_tokens": found["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": found["total_tokens"],
        **({"speculation": found["speculation"]} if "speculation" in found else {}),
    }
