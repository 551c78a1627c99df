"""Asks one engine over HTTP: JSON there, JSON or a stream of events back, as it comes. No torch."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import httpx2
import msgspec

from heliostat.vllm.wire import CODE

CONNECT_SECONDS = 5.0
"""Most seconds until a connection stands; how long an answer may take is for who asks to say."""
IDLE_SECONDS = 2.0
"""Seconds for which an idle connection is kept: less than servers do, which would close it under a request."""
LONGEST_LINE = 2**22
"""Bytes of one event."""
_COMPLAINT = 300
"""Characters of an engine's words that are kept."""


class Refusal(Exception):
    """The engine answered, and not what was asked for: its status, its words, and its code where it names one."""

    def __init__(self, status: int, words: str, code: str = "") -> None:
        super().__init__(words)
        self.status, self.words, self.code = status, words, code


class HttpLine:
    """Connections to one address, as many as there are requests. Whatever breaks on the way is a ConnectionError."""

    def __init__(self, url: str, *, key: str = "") -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._url = url.rstrip("/")
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(
                max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_SECONDS
            ),
            trust_env=False,  # what a proxy would see is not for it
        )

    async def get(self, path: str) -> bytes:
        """The body of what lies there. Raises Refusal where it is none."""
        try:
            reply = await self._http.get(self._url + path)
        except (httpx2.HTTPError, OSError) as error:
            raise ConnectionError(told(error)) from error
        if not reply.is_success:
            raise Refusal(reply.status_code, _complaint(reply.content))
        return reply.content

    async def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """The body of an answer. Cancelling this closes the connection, so that the engine ends the request."""
        async with self._asked(path, body) as reply:
            try:
                return await reply.aread()
            except (httpx2.HTTPError, OSError) as error:
                raise ConnectionError(told(error)) from error

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
        """The data of each event as soon as its bytes are there; ``[DONE]`` is told, too.

        Leaving early closes the connection, so that the engine ends the request.
        """
        async with self._asked(path, body) as reply:
            rest = b""
            try:
                async for part in reply.aiter_raw():
                    *lines, rest = (rest + part).split(b"\n")
                    for line in lines:
                        if line.startswith(b"data:"):
                            yield line[5:].strip()
                    if len(rest) > LONGEST_LINE:
                        raise ConnectionError("an event does not end")
            except (httpx2.HTTPError, OSError) as error:
                raise ConnectionError(told(error)) from error

    def _asked(self, path: str, body: Mapping[str, Any]) -> _Asked:
        content = msgspec.json.encode(body)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        return _Asked(
            self._http, self._http.build_request("POST", self._url + path, content=content, headers=headers)
        )

    async def close(self) -> None:
        """Close what is open."""
        await self._http.aclose()


class _Asked:
    """A request that was sent, and its answer while it is read."""

    def __init__(self, http: httpx2.AsyncClient, request: httpx2.Request) -> None:
        self._http, self._request = http, request

    async def __aenter__(self) -> httpx2.Response:
        try:
            self._reply = await self._http.send(self._request, stream=True)
            if self._reply.is_success:
                return self._reply
            words = _complaint(await self._reply.aread())
        except (httpx2.HTTPError, OSError) as error:
            raise ConnectionError(told(error)) from error
        await self._reply.aclose()
        raise Refusal(self._reply.status_code, words, self._reply.headers.get(CODE, ""))

    async def __aexit__(self, *_: object) -> None:
        await self._reply.aclose()


def told(error: BaseException) -> str:
    """What broke, without an address: some errors carry one, their kinds do not."""
    return type(error).__name__


def words_of(error: Any) -> str:
    """The message of an OpenAI error object, or of whatever is in its place."""
    message = error.get("message", error) if isinstance(error, Mapping) else error
    return str(message)[:_COMPLAINT]


def _complaint(body: bytes) -> str:
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:_COMPLAINT].decode("utf-8", "replace")
    return words_of(found.get("error", found) if isinstance(found, Mapping) else found)
