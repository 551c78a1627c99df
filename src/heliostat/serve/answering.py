"""A job's answer as HTTP: whole, or as a stream of events. A client that leaves ends it at any point."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from heliostat.errors import Refused
from heliostat.serve.service import Job
from heliostat.serve.speaking import Told, usage_of
from heliostat.serve.trouble import Trouble, trouble_of

T = TypeVar("T")


class Gone(Exception):
    """The client has left: there is nobody to answer."""


def packed(content: Any) -> bytes:
    """Compact JSON; half a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class Json(Response):
    """A JSON response that any text fits into."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """As bytes."""
        return packed(content)


async def whole(job: Job) -> dict[str, Any]:
    """The answer when it has ended."""
    try:
        async for place, said in job.asked.pieces():
            job.voices[place].hear(said)
        await job.service.remember(job)
        found = _head(job, job.shape.whole_object) | {"choices": [], "usage": _usage(job)}
        for place, voice in enumerate(job.voices):
            _tell(job, place, voice.whole, job.shape.choice(place, voice.whole), found)
        return found
    finally:
        job.finish()


async def events(job: Job) -> AsyncGenerator[bytes, None]:
    """The answer as it comes. Whatever ends this generator ends the job."""
    options = job.asking.stream_options
    asked = options is not None and bool(options.include_usage)
    always = options is not None and bool(options.continuous_usage_stats)
    head = _head(job, job.shape.chunk_object)
    try:
        async for place, said in job.asked.pieces():
            told = job.voices[place].hear(said)
            if told is None:
                continue
            chunk = {**head, "choices": []}
            _tell(job, place, told, job.shape.chunk(place, told), chunk)
            if asked or always:
                chunk["usage"] = _usage(job) if always else None
            yield event(chunk)
        await job.service.remember(job)  # before the end is told: the next turn may come at once
        if asked:
            yield event({**head, "choices": [], "usage": _usage(job)})
    except Trouble as trouble:
        yield event(trouble.body)
    except Refused as refused:
        yield event(trouble_of(refused).body)
    finally:
        job.finish()
    yield b"data: [DONE]\n\n"


def event(content: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + packed(content) + b"\n\n"


def _head(job: Job, name: str) -> dict[str, Any]:
    return {
        "id": job.id,
        "object": name,
        "created": job.created,
        "model": job.asking.model,
        "system_fingerprint": f"{job.version.name}-{job.version.fingerprint}",
    }


def _tell(job: Job, place: int, told: Told, choice: dict[str, Any], found: dict[str, Any]) -> None:
    """Put a choice into what goes out; with token ids where they were asked for, those of the prompt once."""
    found["choices"].append(choice)
    if not job.asking.return_token_ids:
        return
    choice["token_ids"] = list(told.ids)
    if told.first:
        top = found if job.shape.prompt_on_top else choice
        top["prompt_token_ids"] = list(job.asked.requests[place].prompt)


def _usage(job: Job) -> Mapping[str, Any]:
    asking = job.asking
    return usage_of(job.asked.requests, choices=asking.choices, timings=bool(asking.timings))


class EventStream(Response):
    """Sends events, and notices at once, not only at the next event, when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, told: AsyncGenerator[bytes, None] | None = None) -> None:
        """``told``: the events, where they are not those of a completion."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._job, self._events = job, told or events(job)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs until all is said, or nobody listens."""
        try:
            with suppress(Gone):
                await unless_gone(self._send(send), receive)
        finally:
            await self._events.aclose()
            self._job.finish()  # a generator that was never begun closes without a word

    async def _send(self, send: Send) -> None:
        await self._job.asked.begun()  # what goes wrong before has a status of its own
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """``await work``; it is cancelled, and Gone raised, when the client leaves before."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leaves(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
