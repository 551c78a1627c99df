"""Servers that speak vLLM's dialect as far as our router uses it, on top of our own engine: they really compute, and
really refuse what is not theirs, since ``front.Front`` stands before them as it does before vLLM. With faults."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from heliostat.build import Loaded
from heliostat.engine.request import Sampling
from heliostat.family import Row
from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.http_facts import Expected, wire_role
from heliostat.serve.http_line import HttpLine
from heliostat.serve.http_worker import HttpWorker
from heliostat.serve.protocol import Failed, Handed, Handle, Order, Role, Said
from heliostat.serve.worker import EngineWorker
from heliostat.vllm.asked import Settings
from heliostat.vllm.front import Front
from tests.promises.crews import make_worker
from tests.promises.toys import PAGE

FIT = "fit of the toys"
_numbers = itertools.count()


@dataclass
class Faults:
    """What goes wrong at a server; changed while it runs."""

    pause: float = 0.0
    """Seconds before each event."""
    cut: int | None = None
    """Tokens after which the next streams break."""
    forget: bool = False
    """What was handed over is not found."""


@dataclass(eq=False)
class Double:
    """One server. What it hands over lies in shared memory, and the handle in ``kv_transfer_params`` says where."""

    name: str
    modules: Mapping[str, Loaded]
    """By engine's names. The first one's weights are the server's."""
    tokenizer: Tokenizer
    roles: tuple[Role, ...]
    two_streams: bool = False
    host: str = "127.0.0.1"
    faults: Faults = field(default_factory=Faults)
    facts: dict[str, Any] = field(default_factory=dict)
    """What it says of itself, where that is not what the toys' tests expect."""
    said: int = 0
    """Tokens that went out."""
    begun: int = 0
    aborted: int = 0

    @property
    def weights(self) -> str:
        """Of all its modules."""
        return next(iter(self.modules))

    @property
    def digests(self) -> dict[str, str]:
        return {name: module.digest for name, module in self.modules.items()}

    async def start(self) -> "Double":
        """Listen on a free port of the loopback, on the loop that is running."""
        self.inside: EngineWorker = make_worker(self.modules, self.tokenizer, name=self.name, pace=0.001)
        writers = {name: self.weights if self.two_streams else name for name in self.modules}
        facts: dict[str, Any] = {
            "worker": self.name,
            "incarnation": f"life{next(_numbers)}",
            "role": wire_role(self.roles),
            "modules": self.digests,
            "writers": {name: self.digests[writer] for name, writer in writers.items()},
            "weights": self.weights,
            "two_streams": self.two_streams,
            "page_size": PAGE,
            "dtype": "float32",
            "max_length": 128,
            "max_running": 64,
            "fit": FIT,
            "transfer": "" if len(self.roles) == 2 else "double",
            "folder": "",
            "keep_mib": 1,
            "lease": 60.0,
        }
        self.settings = Settings(**(facts | self.facts))
        app = FastAPI()
        app.post("/v1/completions")(self._complete)
        front = _Versioned(app, self.settings, self._release)
        self.server = uvicorn.Server(
            uvicorn.Config(front, host=self.host, port=0, log_level="critical", ws="none", lifespan="off")
        )
        self.serving = asyncio.get_running_loop().create_task(self.server.serve())
        while not self.server.started:
            await asyncio.sleep(0.001)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://{self.host}:{port}"
        return self

    def worker(self, **more: Any) -> HttpWorker:
        """Our end."""
        facts = {
            "modules": self.digests,
            "roles": self.roles,
            "page_size": PAGE,
            "dtype": "float32",
            "fit": FIT,
        }
        expected = Expected(worker=self.name, **(facts | more.pop("expected", {})))
        options = {"beat": 0.5, "patience": 120.0} | more
        return HttpWorker(HttpLine(self.url), expected, self.tokenizer, **options)

    async def dies(self) -> None:
        """At once: all its connections break, and nobody listens any more."""
        for server in self.server.servers:
            server.close()
        for connection in list(self.server.server_state.connections):
            if (transport := getattr(connection, "transport", None)) is not None:
                transport.abort()
        await self.stop()

    async def stop(self) -> None:
        """End it."""
        self.server.should_exit = self.server.force_exit = True
        with suppress(asyncio.CancelledError):
            await self.serving
        await self.inside.close()

    async def settled(self) -> None:
        """Returns when what it was told has been done."""
        while self.inside.core.lending.out:
            await asyncio.sleep(0.002)

    # ---- what vLLM does

    async def _complete(self, request: Request) -> Any:
        body = await request.json()
        params = body.get("kv_transfer_params") or {}
        self.begun += 1
        await asyncio.sleep(self.faults.pause)
        if params.get("do_remote_decode"):
            return await self._keep(body, params)
        handle = None
        if params.get("do_remote_prefill"):
            if self.faults.forget:
                return _error(500, "Internal server error")
            handle = msgspec.json.decode(params["handle"], type=Handle)
        order = self._order(body, params, handle)
        return StreamingResponse(self._stream(body, order, handle), media_type="text/event-stream")

    def _order(self, body: dict[str, Any], params: dict[str, Any], handle: Handle | None) -> Order:
        """As our engine knows what vLLM would do: everything behind what is loaded is run here, the last token always."""
        speaker, ids = body["model"], body["prompt"]
        writer = self.weights if self.two_streams else speaker
        digests = {name: f"{digest}/torch.float32" for name, digest in self.digests.items()}
        count = len(ids)
        row = Row(writer, writer, speaker, speaker)
        if handle is not None:
            count, row = params["tokens"], Row("elsewhere", writer, speaker, "elsewhere")
            digests["elsewhere"] = f"{params['writer']}/torch.float32"
        return Order(
            id=f"double-{next(_numbers)}",
            row=row,
            digests={name: digests[name] for name in row.modules},
            prompt=tuple(ids[:count]),
            answer=tuple(ids[count:]),
            sampling=_sampling(body, more=len(ids) - count),
        )

    async def _keep(self, body: dict[str, Any], params: dict[str, Any]) -> JSONResponse:
        ids, model = body["prompt"], body["model"]
        order = Order(
            id=f"double-{next(_numbers)}",
            row=Row(model, model, model, model),
            digests={model: f"{self.digests[model]}/torch.float32"},
            prompt=tuple(ids),
            sampling=_sampling({**body, "max_tokens": 2, "stop_token_ids": []}),
        )
        handed = await self.inside.prefill(order)
        if isinstance(handed, Failed):
            return _error(500, handed.reason)
        assert isinstance(handed, Handed) and handed.handle is not None and handed.first is not None
        where = msgspec.json.encode(handed.handle).decode()
        params = {**params, "do_remote_decode": False, "do_remote_prefill": True, "handle": where}
        usage = {"prompt_tokens": len(ids), "prompt_tokens_details": {"cached_tokens": handed.spent.cached}}
        choice = _choice(handed.first, body, finish="length")
        return JSONResponse({"choices": [choice], "usage": usage, "kv_transfer_params": params})

    def _release(self, handle: str) -> None:
        self.inside.release(msgspec.json.decode(handle, type=Handle))

    async def _stream(self, body: dict[str, Any], order: Order, handle: Handle | None) -> AsyncIterator[str]:
        inbox: asyncio.Queue[Said | Failed] = asyncio.Queue()
        failed = await self.inside.decode(order, inbox.put_nowait, handle)
        ended, count, cached = False, 0, 0
        try:
            while not ended:
                said = failed or await inbox.get()
                if isinstance(said, Failed):
                    yield f"data: {json.dumps({'error': {'message': said.reason, 'code': 500}})}\n\n"
                    return
                await asyncio.sleep(self.faults.pause)
                if self.faults.cut is not None and count >= self.faults.cut:
                    raise OSError("cut")
                cached = said.spent.cached if said.spent is not None else cached
                ended, count = said.finish is not None, count + 1
                self.said += 1
                yield f"data: {json.dumps({'choices': [_choice(said, body, finish=said.finish)]})}\n\n"
            usage = {"prompt_tokens": len(body["prompt"]), "prompt_tokens_details": {"cached_tokens": cached}}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.aborted += not ended
            self.inside.abort(order.id)


class _Versioned(Front):
    """No vLLM is installed here: the newest known version is told. What is released is the double's."""

    def __init__(self, app: Any, settings: Settings, release: Callable[[str], None]) -> None:
        super().__init__(app, settings)
        self._let = release

    async def _release(self, body: bytes | None, send: Any) -> None:
        self._let(msgspec.json.decode(body or b"")["handle"])
        await super()._release(body, send)

    def described(self, scope: Any) -> Any:
        return msgspec.structs.replace(super().described(scope), vllm="0.32.0")


def _sampling(body: Mapping[str, Any], *, more: int = 0) -> Sampling:
    return Sampling(
        max_tokens=body["max_tokens"] + more,
        min_tokens=body["min_tokens"] + more if body["min_tokens"] else 0,
        temperature=body["temperature"],
        top_p=body["top_p"],
        top_k=body["top_k"],
        min_p=body["min_p"],
        seed=body.get("seed", 0),
        ignore_eos=not body["stop_token_ids"],
        logprobs=body.get("logprobs"),
        presence_penalty=body["presence_penalty"],
        frequency_penalty=body["frequency_penalty"],
        logit_bias={int(token): bias for token, bias in body.get("logit_bias", {}).items()},
    )


def _choice(said: Said, body: Mapping[str, Any], *, finish: str | None) -> dict[str, Any]:
    sampled = said.sampled
    found: dict[str, Any] = {
        "index": 0,
        "text": said.text,
        "token_ids": [sampled.token],
        "finish_reason": finish,
    }
    if body.get("logprobs") is not None:
        found["logprobs"] = {
            "tokens": [f"token_id:{sampled.token}"],
            "token_logprobs": [sampled.logprob],
            "top_logprobs": [{f"token_id:{token}": chance for token, chance in sampled.top}],
        }
    return found


def _error(status: int, words: str) -> JSONResponse:
    return JSONResponse({"error": {"message": words, "code": status}}, status)
