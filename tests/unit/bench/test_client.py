"""The client against servers that behave, and that break in every way there is: nothing raises, all is counted."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest

from heliostat.bench.client import Answer, Asking, Client, Manner
from heliostat.bench.measure import found_members
from heliostat.bench.records import Limits, Record
from heliostat.errors import Refused
from tests.unit.bench.conftest import HEAD, LAST, Say, chunk, event, refusal, serving, usage

ASKING = Asking("a", 8, messages=[{"role": "user", "content": "hello"}])


def record() -> Record:
    return Record(run=0, session=0, call=0, member="a", task="t", time=0.0, scheduled=0.0, asked_tokens=8)


def asked(say: Say, asking: Asking = ASKING, **manner: Any) -> tuple[Record, Answer]:
    async def work() -> tuple[Record, Answer]:
        async with asyncio.timeout(20), serving(say) as url, Client(Manner(url, **manner)) as client:
            found = record()
            return found, await client.ask(asking, found)

    return asyncio.run(work())


def saying(*parts: bytes) -> Say:
    async def say(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)

    return say


def test_an_answer_with_all_that_a_server_may_tell() -> None:
    bodies = []

    async def say(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        bodies.append(body)
        told = [chunk("Hel", usage=None), chunk("lo"), LAST, usage(30, 3, cached=16), b"[DONE]"]
        writer.write(HEAD + b": a comment\r\n\r\n" + b"".join(map(event, told)))

    found, answer = asked(say, key="secret")
    assert (found.outcome, answer.text, found.chunks, found.tries) == ("answered", "Hello", 2, 1)
    assert (found.prompt_tokens, found.answer_tokens, found.cached_tokens) == (30, 3, 16)
    assert found.sent is not None and found.first is not None and found.last is not None
    assert found.sent <= found.first <= found.last <= found.end
    assert found.moments == 1 and found.bundled, "all of it came at once"
    (body,) = bodies
    assert (
        body["ignore_eos"] and body["stream_options"] == {"include_usage": True} and body["max_tokens"] == 8
    )


def test_ids_and_only_what_every_server_knows() -> None:
    async def say(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        assert body["prompt"] == [1, 2] and "messages" not in body and "ignore_eos" not in body
        told = {"choices": [{"text": "", "token_ids": [7, 8], "finish_reason": None}]}
        end = {"choices": [{"text": "x", "token_ids": [9], "finish_reason": "length"}]}
        writer.write(HEAD + event(told) + event(end))

    found, answer = asked(say, Asking("a", 3, ids=[1, 2]), plain=True)
    assert (found.outcome, answer.ids, answer.text, found.chunks) == ("answered", [7, 8, 9], "x", 2)
    assert found.answer_tokens is None and found.tokens == 2, "no usage: chunks are counted"


def test_a_stream_that_comes_in_crumbs() -> None:
    whole = HEAD + event(chunk("é")) + event(LAST).rstrip(b"\n")

    async def say(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        for place in range(len(whole)):
            writer.write(whole[place : place + 1])
            await writer.drain()

    found, answer = asked(say)
    assert (found.outcome, answer.text) == ("answered", "é")


class Slowly(httpx2.AsyncByteStream, httpx2.AsyncBaseTransport):
    """No socket: a second to the first part, half a second to each that follows."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = parts

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(0.5)
        return httpx2.Response(200, stream=self)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            await asyncio.sleep(0.5)
            yield part


def test_times_are_those_at_which_bytes_were_there(virtually: Callable[..., Any]) -> None:
    async def work(*parts: bytes) -> Record:
        async with Client(Manner("http://there/v1"), transport=Slowly(*parts)) as client:
            found = record()
            await client.ask(ASKING, found)
            return found

    words = [event(chunk(word)) for word in "abc"]
    end = event(LAST) + event(usage(3, 3)) + event(b"[DONE]")
    one_by_one = virtually(work(*words, end))
    assert (one_by_one.sent, one_by_one.first, one_by_one.last) == (0.0, 1.0, 2.5)
    assert (one_by_one.tpot, one_by_one.moments, one_by_one.bundled) == (0.75, 3, False)
    together = virtually(work(b"".join(words), end))
    assert (together.first, together.chunks, together.moments, together.bundled) == (1.0, 3, 1, True)


@pytest.mark.parametrize(
    ("parts", "outcome", "told"),
    [
        ([HEAD, event(chunk("a"))], "cut", "ended before"),
        ([HEAD], "cut", "ended before"),
        ([HEAD, event(b"[DONE]")], "cut", "nothing was said"),
        ([HEAD, event(chunk("a")), event(b"{oops"), event(LAST)], "malformed", "1 events"),
        ([HEAD, event(b"[1, 2]"), event(chunk("a")), event(LAST)], "malformed", "1 events"),
        ([HEAD, event(chunk("a")), event({"error": {"message": "out of pages"}})], "error", "out of pages"),
        ([HEAD, event({"error": "plainly so"})], "error", "plainly so"),
        ([refusal(500, b'{"error": {"message": "a fault"}}')], "status 500", "a fault"),
        ([refusal(503, b"<html>")], "status 503", "<html>"),
        ([b""], "disconnected", "disconnected"),
        ([b"no HTTP at all\r\n\r\n"], "disconnected", ""),
        (
            [HEAD.replace(b"Connection", b"Content-Length: 9999\r\nConnection"), event(chunk("a"))],
            "disconnected",
            "",
        ),
    ],
)
def test_what_breaks_is_an_outcome(parts: list[bytes], outcome: str, told: str) -> None:
    found, _ = asked(saying(*parts))
    assert found.outcome == outcome and told in found.told
    assert not found.answered and not found.meets(Limits())


def test_strange_numbers_and_choices_are_not_believed() -> None:
    strange = {"usage": {"prompt_tokens": "many", "completion_tokens": -1, "prompt_tokens_details": 3}}
    parts = [chunk("a"), {"choices": "none"}, {"choices": [3]}, {"choices": [], **strange}, LAST]
    found, _ = asked(saying(HEAD, *map(event, parts)))
    assert (found.outcome, found.prompt_tokens, found.answer_tokens) == ("answered", None, None)


def test_a_line_without_an_end_is_malformed() -> None:
    found, _ = asked(saying(HEAD, b"data: " + b"x" * (2**22 + 10)))
    assert found.outcome == "malformed"


def test_too_many_is_waited_out_and_counted() -> None:
    tries = []

    async def say(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        tries.append(1)
        if len(tries) < 3:
            writer.write(refusal(429, b"{}", "Retry-After: 0"))
        else:
            writer.write(HEAD + event(chunk("a")) + event(LAST))

    found, _ = asked(say)
    assert (found.outcome, found.too_many, found.tries) == ("answered", 2, 3)
    assert found.lag == 0.0, "what the server made us wait is not our lag"
    tries.clear()
    found, _ = asked(say, retries=1)
    assert (found.outcome, found.too_many, found.tries) == ("status 429", 2, 2)


def test_who_never_ends_is_given_up() -> None:
    async def say(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + event(chunk("a")))
        await writer.drain()
        await asyncio.Event().wait()

    found, _ = asked(say, timeout=1.0)
    assert found.outcome == "timeout" and found.first is not None


def test_nobody_there() -> None:
    async def work() -> Record:
        async with Client(Manner("http://127.0.0.1:1/v1")) as client:
            found = record()
            await client.ask(ASKING, found)
            return found

    assert asyncio.run(work()).outcome == "unreachable"
    with pytest.raises(Refused, match="does not answer"):
        found_members(Manner("http://127.0.0.1:1/v1"), [])
    with pytest.raises(Refused, match="must be like"):
        Client(Manner("localhost:8000"))


def test_members_are_those_that_the_server_lists() -> None:
    async def work() -> list[str] | None:
        async with serving(saying()) as url, Client(Manner(url)) as client:
            return await client.members()

    assert asyncio.run(work()) == ["a", "base"]


def test_phases_are_believed_where_they_are_whole() -> None:
    def told(timings: Any) -> dict[str, float] | None:
        end = {**usage(3, 2), "usage": {"heliostat_timings": timings}}
        return asked(saying(HEAD, event(chunk("a")), event(LAST), event(end), event(b"[DONE]")))[0].phases

    phases: dict[str, Any] = {"queue": 0.5, "prefill": 1, "transfer": 0.0, "decode": 2.0}
    assert told([{**phases, "total": 4.0}]) == phases
    for strange in (
        [phases, phases],
        [{**phases, "queue": -1}],
        [{**phases, "decode": None}],
        "soon",
        [3],
        None,
    ):
        assert told(strange) is None
    assert told([{**phases, "queue": float("inf")}]) is None
