"""One request to an OpenAI server, ours or not, and what came of it: a stream that may break at any point. No torch.

Nothing that a server does raises here: a broken stream, a bad chunk, a refusal are outcomes of a record. Times are
taken from the event loop's clock when bytes are there; how late the loop itself was is measured beside it.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from heliostat.bench.records import ANSWERED, PHASES, Record
from heliostat.errors import Refused

LONGEST_WAIT = 30.0
"""Most seconds that a Retry-After is believed."""
DEFAULT_WAIT = 1.0
"""Where a server says 429 and not when to come back."""
LONGEST_WORDS = 300
"""Characters of a server's complaint that are kept."""
LONGEST_LINE = 2**22
"""Characters of an event: a stream without line ends is malformed, not a reason to run out of memory."""


@dataclass(frozen=True, slots=True)
class Asking:
    """What is sent: one of ``ids`` and ``messages``."""

    member: str
    max_tokens: int
    ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, str]] | None = None


@dataclass(slots=True)
class Answer:
    """What was said, as far as it came."""

    text: str = ""
    ids: list[int] | None = None
    """Where the server tells them."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How a server is asked."""

    url: str
    """With /v1."""
    key: str | None = None
    plain: bool = False
    """Only fields of the official dialect: answers may then be shorter than asked for, and no ids come back."""
    timeout: float = 120.0
    retries: int = 5
    """How often an answer with status 429 is waited out."""
    seed: int = 0


@dataclass(slots=True)
class Client:
    """Asks; ``async with`` it."""

    manner: Manner
    transport: httpx2.AsyncBaseTransport | None = None
    _http: httpx2.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        if not self.manner.url.startswith(("http://", "https://")):
            raise Refused(f"url is {self.manner.url!r}; it must be like http://127.0.0.1:8000/v1")
        headers = {"Authorization": f"Bearer {self.manner.key}"} if self.manner.key else {}
        self._http = httpx2.AsyncClient(
            headers=headers,
            transport=self.transport,
            timeout=httpx2.Timeout(None),  # ours is around the whole request
            # As many connections as there are requests: waiting for one would be our slowness.
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def members(self) -> list[str] | None:
        """Names that the server answers to; None where it does not tell. Refused where there is none to ask."""
        try:
            async with asyncio.timeout(self.manner.timeout):
                reply = await self._http.get(self._address("models"))
        except (httpx2.HTTPError, TimeoutError, OSError) as error:
            raise Refused(
                f"{self.manner.url} does not answer ({_words(error)}): is the server up?"
            ) from error
        if reply.status_code in (401, 403):
            raise Refused(
                f"{self.manner.url} wants a key (status {reply.status_code}): give it with --key-env"
            )
        try:
            listed = reply.json()["data"]
            parents = {str(model["id"]): model.get("parent") for model in listed}
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return sorted(parents, key=lambda name: parents[name] is None)  # a base comes last

    async def ask(self, asking: Asking, record: Record) -> Answer:
        """Send it, now, and fill the record; always ends, within the timeout."""
        clock, answer = asyncio.get_running_loop().time, Answer()
        try:
            async with asyncio.timeout(self.manner.timeout):
                await self._tried(asking, record, answer)
        except TimeoutError:
            record.outcome, record.told = "timeout", f"given up after {self.manner.timeout:g} s"
        except httpx2.ConnectError as error:
            record.outcome, record.told = "unreachable", _words(error)
        except (httpx2.HTTPError, OSError) as error:
            record.outcome, record.told = "disconnected", _words(error)
        record.end = clock()
        return answer

    async def _tried(self, asking: Asking, record: Record, answer: Answer) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            record.sent, record.tries = clock(), record.tries + 1
            async with self._http.stream("POST", self._path(asking), json=self._body(asking)) as reply:
                if reply.status_code == 200:
                    return await _heard(reply, record, answer)
                record.outcome = f"status {reply.status_code}"
                record.told = await _complaint(reply)
                wait = _retry_after(reply.headers.get("retry-after"))
            record.too_many += reply.status_code == 429
            if reply.status_code != 429 or record.tries > self.manner.retries:
                return
            await asyncio.sleep(wait)

    def _address(self, path: str) -> str:
        return f"{self.manner.url.rstrip('/')}/{path}"

    def _path(self, asking: Asking) -> str:
        return self._address("completions" if asking.messages is None else "chat/completions")

    def _body(self, asking: Asking) -> dict[str, Any]:
        asked: dict[str, Any] = {"prompt": list(asking.ids or ())}
        if asking.messages is not None:
            asked = {"messages": list(asking.messages)}
        more = ("ignore_eos", "return_token_ids", "timings")
        extra = {} if self.manner.plain else dict.fromkeys(more, True)
        return {
            "model": asking.member,
            **asked,
            "max_tokens": asking.max_tokens,
            "temperature": 0,
            "seed": self.manner.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
            **extra,
        }


async def _heard(reply: httpx2.Response, record: Record, answer: Answer) -> None:
    """Listen to a stream; the record's outcome is then what came of it."""
    done = ended = False
    async for now, data in _events(reply):
        if data == "[DONE]":
            done = True
            continue
        chunk = _object(data)
        if chunk is None:
            record.bad_chunks += 1
        elif chunk.get("error"):
            record.outcome, record.told = "error", _message(chunk["error"])
            return
        else:
            _count(chunk.get("usage"), record)
            text, ids, last = _said(chunk.get("choices"))
            ended = ended or last
            answer.text += text
            if ids is not None:
                answer.ids = [*(answer.ids or ()), *ids]
            if text or ids:
                record.chunks += 1
                record.moments += now != record.last
                record.first = now if record.first is None else record.first
            if text or ids or last:
                record.last = now
    if record.first is None:  # what was said may be tokens without a text
        record.first = record.last
    if record.bad_chunks:
        record.outcome, record.told = "malformed", f"{record.bad_chunks} events were no JSON objects"
    elif not (done or ended):
        record.outcome, record.told = "cut", "the stream ended before the answer did"
    elif record.first is None:
        record.outcome, record.told = "cut", "nothing was said"
    else:
        record.outcome, record.told = ANSWERED, ""


async def _events(reply: httpx2.Response) -> AsyncIterator[tuple[float, str]]:
    """(when its bytes were there, data) of server-sent events; comments and other fields are passed over."""
    clock = asyncio.get_running_loop().time
    rest, now = b"", clock()
    async for part in reply.aiter_bytes():
        now = clock()
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield now, line[5:].decode("utf-8", "replace").strip()
        if len(rest) > LONGEST_LINE:
            yield now, "an event that does not end"
            rest = b""
    if rest.startswith(b"data:"):
        yield now, rest[5:].decode("utf-8", "replace").strip()


def _object(data: str) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _count(usage: Any, record: Record) -> None:
    """What the server counts, where it is numbers."""
    if not isinstance(usage, dict):
        return
    details = usage.get("prompt_tokens_details")
    record.prompt_tokens = _number(usage.get("prompt_tokens"), record.prompt_tokens)
    record.answer_tokens = _number(usage.get("completion_tokens"), record.answer_tokens)
    if isinstance(details, dict):
        record.cached_tokens = _number(details.get("cached_tokens"), record.cached_tokens)
    record.phases = _phases(usage.get("heliostat_timings")) or record.phases


def _phases(timings: Any) -> dict[str, float] | None:
    """Seconds of the one answer by phase; None where that is not what is there."""
    first = timings[0] if isinstance(timings, list) and len(timings) == 1 else None
    found = {name: first.get(name) for name in PHASES} if isinstance(first, dict) else {}
    known = {n: float(v) for n, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return known if len(known) == len(PHASES) and all(0 <= v < math.inf for v in known.values()) else None


def _number(value: Any, otherwise: int | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else otherwise


def _said(choices: Any) -> tuple[str, list[int] | None, bool]:
    """(text, token ids where they are told, whether it was the last) of a chunk; both kinds of completion."""
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "", None, False
    choice = choices[0]
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    ids = choice.get("token_ids")
    known = ids if isinstance(ids, list) and all(isinstance(token, int) for token in ids) else None
    return text if isinstance(text, str) else "", known, choice.get("finish_reason") is not None


async def _complaint(reply: httpx2.Response) -> str:
    """A server's words for why not."""
    body = (await reply.aread())[: 2**16].decode("utf-8", "replace")
    found = _object(body)
    return _message(found["error"]) if found and "error" in found else body[:LONGEST_WORDS]


def _message(error: Any) -> str:
    words = error.get("message") if isinstance(error, dict) else error
    return str(words)[:LONGEST_WORDS]


def _retry_after(header: str | None) -> float:
    """Seconds to wait; a date, or what is no number, counts as no word."""
    try:
        wait = float(header) if header is not None else DEFAULT_WAIT
    except ValueError:
        return DEFAULT_WAIT
    return min(LONGEST_WAIT, wait) if wait >= 0 else DEFAULT_WAIT


def _words(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:LONGEST_WORDS]
