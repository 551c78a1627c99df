"""What stands before a vLLM worker's requests: says what the worker is, and turns away what it must not run, and why.

An ASGI middleware (``vllm serve --middleware heliostat.vllm.front.Front``). Knows no torch; of vLLM only its version.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from heliostat.errors import Refused
from heliostat.vllm.asked import Settings, Wrong, settings_of, wrong
from heliostat.vllm.launch import FILES
from heliostat.vllm.wire import CODE, DESCRIBED, PARAMS, RELEASE, Described, Facts, tokens_digest

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

ASKED = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
MAX_BODY = 64 << 20
"""Bytes; a longer one is refused unread."""


class Asked(msgspec.Struct):
    """Of a request's body, what is looked at. Everything else goes on as it came."""

    model: str = ""
    prompt: Any = None
    kv_transfer_params: dict[str, Any] | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None


class Released(msgspec.Struct):
    """Body of ``RELEASE``."""

    handle: str


class Front:
    """See the module. ``settings``: None: out of the environment."""

    def __init__(self, app: App, settings: Settings | None = None) -> None:
        self.app = app
        self.settings = settings_of() if settings is None else settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if self.settings is None or scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if path in (DESCRIBED, RELEASE):
            return await self._own(scope, receive, send)
        if path not in ASKED or scope["method"] != "POST" or not _allowed(scope):
            return await self.app(scope, receive, send)  # behind this stands vLLM's own question for the key
        body = await _body(receive)
        if body is None:
            return await _say(send, 413, Wrong("refused", f"the body has more than {MAX_BODY >> 20} MiB"))
        if (found := self._wrong(path, body)) is not None:
            return await _say(send, 409, found)
        return await self.app(scope, _again(body, receive), send)

    async def _own(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _allowed(scope):
            return await _say(send, 401, Wrong("refused", "a key is asked for"))
        if scope["path"] == DESCRIBED and scope["method"] == "GET":
            return await _reply(send, 200, msgspec.json.encode(self.described(scope)))
        if scope["path"] == RELEASE and scope["method"] == "POST":
            return await self._release(await _body(receive), send)
        return await _say(send, 405, Wrong("refused", f"{scope['method']} is not what this path takes"))

    def described(self, scope: Scope) -> Described:
        """What this worker is."""
        settings = self.settings
        assert settings is not None
        facts = {name: getattr(settings, name) for name in Facts.__struct_fields__}
        here: dict[str, Any] = {
            "vllm": _version("vllm"),
            "heliostat": _version("heliostat"),
            "pages": _pages(scope),
        }
        return Described(**facts, **here)

    async def _release(self, body: bytes | None, send: Send) -> None:
        settings = self.settings
        assert settings is not None
        try:
            released = msgspec.json.decode(body or b"", type=Released)
        except msgspec.DecodeError as error:
            return await _say(send, 400, Wrong("refused", str(error)))
        if settings.transfer == FILES:
            from heliostat.vllm import (
                kept,
            )  # not for those whose keys and values travel otherwise: it loads torch

            kept.release(kept.private_folder(settings.folder), released.handle)
        await _reply(send, 204, b"")

    def _wrong(self, path: str, body: bytes) -> Wrong | None:
        settings = self.settings
        assert settings is not None
        try:
            asked = msgspec.json.decode(body, type=Asked)
        except msgspec.DecodeError:
            return None  # vLLM says what is wrong with it
        if settings.two_streams and (asked.prompt_logprobs is not None or asked.echo):
            return Wrong("refused", "two streams know nobody's log-probabilities of a prompt")
        if settings.role == "both" and not asked.kv_transfer_params:
            return None
        ids = asked.prompt
        if path != ASKED[0] or not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            return Wrong("refused", f"this worker takes token ids at {ASKED[0]}, one prompt at a time")
        params = asked.kv_transfer_params
        if (found := wrong(settings, asked.model, params, len(ids))) is not None:
            return found
        if params and params.get("do_remote_prefill") and settings.transfer == FILES:
            return _not_there(settings, params, ids)
        return None


def _not_there(settings: Settings, params: dict[str, Any], ids: list[int]) -> Wrong | None:
    from heliostat.vllm import kept

    digest = tokens_digest(ids[: params["tokens"]])
    label = kept.Label(params["writer"], params["tokens"], digest, settings.fit, "", "")
    try:
        kept.check_any(kept.private_folder(settings.folder), str(params.get("handle", "")), label)
    except Refused as refused:
        return Wrong("pages_gone", str(refused))
    return None


def _allowed(scope: Scope) -> bool:
    """vLLM's own check of keys looks at /v1 only."""
    key = os.environ.get("VLLM_API_KEY", "")
    given = dict(scope["headers"]).get(b"authorization", b"")
    return not key or hmac.compare_digest(given, f"Bearer {key}".encode())


def _pages(scope: Scope) -> int:
    """Of the cache, where this version of vLLM keeps it where its server can see it."""
    config = getattr(getattr(scope.get("app"), "state", None), "vllm_config", None)
    count = getattr(getattr(config, "cache_config", None), "num_gpu_blocks", None)
    return count if isinstance(count, int) else 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


async def _body(receive: Receive) -> bytes | None:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b""  # whoever asked has gone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, and then what comes after it: that the client has gone."""
    given = False

    async def once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


async def _say(send: Send, status: int, found: Wrong) -> None:
    error = {"message": found.reason, "type": found.code, "code": status, "param": PARAMS}
    await _reply(send, status, msgspec.json.encode({"error": error}), found.code)


async def _reply(send: Send, status: int, body: bytes, code: str = "") -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if code:
        headers.append((CODE.lower().encode(), code.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
