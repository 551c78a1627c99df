"""The routes: what is asked where. Each reads, asks the service, and writes; nothing is decided here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from heliostat.serve import page, responding
from heliostat.serve.answering import EventStream, Gone, Json, unless_gone, whole
from heliostat.serve.dialect import (
    Asking,
    CanaryAsking,
    ChatAsking,
    DetokenizeAsking,
    Loose,
    SourceAsking,
    TextAsking,
    TokenizeAsking,
    parse,
)
from heliostat.serve.forms import turns
from heliostat.serve.gate import Gate
from heliostat.serve.keys import Tenant
from heliostat.serve.responses import ResponsesAsking
from heliostat.serve.roster import Version
from heliostat.serve.service import Job, Service
from heliostat.serve.speaking import usage_of
from heliostat.serve.trouble import Trouble

M = TypeVar("M", bound=Loose)
router = APIRouter()


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _tenant(request: Request) -> Tenant:
    tenant: Tenant | None = request.state.tenant
    assert tenant is not None, "the gate lets nobody through without"
    return tenant


Serving = Annotated[Service, Depends(_service)]
Whose = Annotated[Tenant, Depends(_tenant)]


def build(service: Service, *, version: str) -> FastAPI:
    """The application around a service; its lifespan starts and stops the workers."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    # No pages of documentation: they would fetch scripts from elsewhere.
    app = FastAPI(title="heliostat", version=version, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    app.add_exception_handler(HTTPException, _http_trouble)
    app.add_middleware(Gate, service=service)
    return app


async def _http_trouble(request: Request, error: Exception) -> Response:
    """Paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    trouble = Trouble(error.status_code, f"{request.method} of this path: {error.detail}")
    return Json(trouble.body, error.status_code, headers=dict(error.headers or {}))


def _body_of(kind: type[Loose]) -> dict[str, Any]:
    """What OpenAPI says of a body that ``_read`` reads."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inlined(schema, parts)}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """A schema whose references are replaced by what they refer to; none of ours refers to itself."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
        return {key: _inlined(value, parts) for key, value in schema.items()}
    return [_inlined(value, parts) for value in schema] if isinstance(schema, list) else schema


async def _read(request: Request, kind: type[M]) -> M:
    """The body as one of the dialect's requests; fields that nobody knows get one warning."""
    service = _service(request)
    try:
        async with asyncio.timeout(service.limits.body_seconds):
            body = await _bytes(request, service.limits.body)
    except TimeoutError:
        raise Trouble(408, f"the body did not come within {service.limits.body_seconds:g} s") from None
    found, unknown = parse(kind, body or b"{}")
    for name in unknown:
        service.log.warn_once(
            f"field {name[:64]!r} is not known and ignored", request_id=request.state.request_id
        )
    return found


async def _bytes(request: Request, most: int) -> bytes:
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise Trouble(413, f"the body is larger than {most} bytes", code="body_too_large")
            parts.append(part)
    except ClientDisconnect:
        raise Gone from None
    return b"".join(parts)


# ---- completions


@router.post("/v1/chat/completions", openapi_extra=_body_of(ChatAsking))
async def chat(request: Request, service: Serving, tenant: Whose) -> Response:
    """Answer a conversation."""
    asking = await _read(request, ChatAsking)
    return await _answered(request, asking, await unless_gone(service.chat(asking, tenant), request.receive))


@router.post("/v1/completions", openapi_extra=_body_of(TextAsking))
async def complete(request: Request, service: Serving, tenant: Whose) -> Response:
    """Go on with a text."""
    asking = await _read(request, TextAsking)
    return await _answered(
        request, asking, await unless_gone(service.complete(asking, tenant), request.receive)
    )


@router.post("/v1/responses", openapi_extra=_body_of(ResponsesAsking))
async def respond(request: Request, service: Serving, tenant: Whose) -> Response:
    """Answer a conversation in items and events; nothing is kept of it."""
    asking = await _read(request, ResponsesAsking)
    job = await unless_gone(responding.taken_in(service, asking, tenant), request.receive)
    request.state.told = partial(_counts, job)
    if asking.stream:
        return EventStream(job, responding.events(job, asking))
    try:
        return Json(await unless_gone(responding.whole(job, asking), request.receive))
    finally:
        job.finish()


async def _answered(request: Request, asking: Asking, job: Job) -> Response:
    request.state.told = partial(_counts, job)
    if asking.stream:
        return EventStream(job)
    try:
        return Json(await unless_gone(whole(job), request.receive))
    finally:
        job.finish()


def _counts(job: Job) -> dict[str, Any]:
    """What the log tells of a job."""
    usage = dict(usage_of(job.asked.requests, choices=job.asking.choices))
    return {
        "member": job.version.name,
        "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "completion_tokens": usage["completion_tokens"],
    }


@router.post("/tokenize", openapi_extra=_body_of(TokenizeAsking))
async def tokenize(request: Request, service: Serving, tenant: Whose) -> Response:
    """The ids that a prompt or a conversation has."""
    asking = await _read(request, TokenizeAsking)
    service.find(asking.model, tenant)
    if (asking.prompt is None) == (asking.messages is None):
        raise Trouble(400, "give one of prompt and messages", "prompt")
    tokenizer, tools = service.tokenizer, [tool.model_dump(exclude_none=True) for tool in asking.tools or ()]
    if tools and asking.messages is None:
        raise Trouble(400, "tools are shown in a conversation: give messages", "tools")
    if asking.messages is not None:
        ids = await asyncio.to_thread(tokenizer.prompt_ids, turns(asking.messages), tools=tools)
    else:
        ids = await asyncio.to_thread(tokenizer.plain_prompt_ids, asking.prompt or "")
    words = [tokenizer.decode([i], skip_special=False) for i in ids] if asking.return_token_strs else None
    longest = service.dispatcher.max_length
    return Json({"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": words})


@router.post("/detokenize", openapi_extra=_body_of(DetokenizeAsking))
async def detokenize(request: Request, service: Serving, tenant: Whose) -> Response:
    """The text that ids have."""
    asking = await _read(request, DetokenizeAsking)
    service.find(asking.model, tenant)
    size = service.tokenizer.size
    if not all(0 <= token < size for token in asking.tokens):
        raise Trouble(400, f"tokens holds ids outside [0, {size})", "tokens")
    return Json({"prompt": service.tokenizer.decode(asking.tokens, skip_special=False)})


@router.get("/v1/models")
async def models(service: Serving, tenant: Whose) -> Response:
    """The members that this key may ask."""
    public = {name: v for name, v in service.roster.public().items() if tenant.may(name)}
    return Json({"object": "list", "data": [_card(service, name, v) for name, v in public.items()]})


@router.get("/v1/models/{name:path}")
async def model(name: str, service: Serving, tenant: Whose) -> Response:
    """One of them."""
    return Json(_card(service, name, service.find(name, tenant)))


def _card(service: Service, name: str, version: Version) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": service.began,
        "owned_by": "heliostat",
        "root": version.member,
        "parent": None if version.member == "base" else "base",
        "max_model_len": service.dispatcher.max_length,
        "version": version.name,
        "fingerprint": version.fingerprint,
    }


# ---- members


@router.get("/admin/members")
async def members(service: Serving) -> Response:
    """Who is served in which versions, and how many requests each has in flight."""
    seats = service.roster.seats
    return Json({"members": {m: [_standing(service, v, m) for v in seats[m].versions] for m in seats}})


def _standing(service: Service, version: Version, member: str) -> dict[str, Any]:
    seat = service.roster.seats[member]
    share = seat.share if version == seat.canary else 1 - seat.share if seat.canary else 1.0
    return {
        "version": version.name,
        "source": version.source,
        "share": share,
        "fingerprint": version.fingerprint,
        "in_flight": service.roster.flying(version),
    }


@router.post("/admin/members/{member}/load", openapi_extra=_body_of(SourceAsking))
async def load(member: str, request: Request, service: Serving) -> Response:
    """Serve one more member of the family."""
    asking = await _read(request, SourceAsking)
    return Json(_standing(service, await service.load(member, asking.source), member))


@router.post("/admin/members/{member}/roll", openapi_extra=_body_of(SourceAsking))
async def roll(member: str, request: Request, service: Serving) -> Response:
    """Let a newer version take a member's place."""
    asking = await _read(request, SourceAsking)
    return Json(_standing(service, await service.roll(member, asking.source), member))


@router.post("/admin/members/{member}/canary", openapi_extra=_body_of(CanaryAsking))
async def canary(member: str, request: Request, service: Serving) -> Response:
    """Try a newer version on a share of the requests; 0 ends it."""
    asking = await _read(request, CanaryAsking)
    await service.canary(member, asking.share, asking.source)
    return Json({"members": [_standing(service, v, member) for v in service.roster.seat(member).versions]})


@router.post("/admin/members/{member}/unload")
async def unload(member: str, service: Serving) -> Response:
    """Serve a member no more."""
    await service.unload(member)
    return Json({"unloaded": member})


# ---- how it is


@router.get("/health")
async def health(service: Serving) -> Response:
    """200 while it is well and not shutting down; which workers are not as they should be."""
    state: dict[str, Any] = {"status": _state(service)}
    if missing := service.crew.missing():
        state["workers"] = missing
    return Json(state, 200 if service.ready else 503)


@router.get("/ready")
async def ready(service: Serving) -> Response:
    """200 while new requests are taken in."""
    return await health(service)


@router.get("/live")
async def live(service: Serving) -> Response:
    """200 unless it must be started again."""
    failed = bool(service.failure)
    return Json({"status": _state(service)}, 503 if failed else 200)


def _state(service: Service) -> str:
    return "failed" if service.failure else "draining" if service.draining else "ok"


@router.get("/version")
async def version(request: Request) -> Response:
    """Of heliostat."""
    return Json({"version": request.app.version})


@router.get("/metrics")
async def metrics(service: Serving) -> Response:
    """For Prometheus."""
    await service.look()
    return PlainTextResponse(
        service.dispatcher.metrics.text(),
        headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
    )


@router.get("/", include_in_schema=False)
async def front(request: Request, service: Serving) -> Response:
    """The page; without a key only the question for one."""
    tenant: Tenant | None = request.state.tenant
    return await page.front(service, tenant)


@router.get("/page", include_in_schema=False)
async def live_part(service: Serving, tenant: Whose) -> Response:
    """The part of the page that changes."""
    return await page.live(service, tenant)
