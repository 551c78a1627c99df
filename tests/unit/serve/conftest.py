"""A server in the test's own process: the tiny family behind the real routes, asked over an ASGI transport."""

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from heliostat.build import init_family
from heliostat.engine.engine import Engine, Piece
from heliostat.serve.app import build
from heliostat.serve.crew import Alone
from heliostat.serve.log import Log
from heliostat.serve.run import Settings, service_of
from heliostat.serve.service import Service

KEYS = {
    "alice-0123456789abcdef": {"name": "alice", "members": ["math", "code"]},
    "bob-0123456789abcdef": {"name": "bob", "members": "all"},
    "root-0123456789abcdef": {"name": "root", "members": "all", "admin": True},
}


@dataclass
class Served:
    """A server to ask, and its inside to look at."""

    service: Service
    client: httpx2.AsyncClient
    app: Any
    log: io.StringIO = field(default_factory=io.StringIO)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log so far."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    async def post(self, path: str, status: int = 200, key: str = "", **body: Any) -> Any:
        """The JSON that comes back."""
        reply = await self.client.post(path, content=json.dumps(body), headers=bearer(key))
        assert reply.status_code == status, reply.text
        return reply.json()

    async def get(self, path: str, status: int = 200, key: str = "") -> Any:
        """The JSON that comes back."""
        reply = await self.client.get(path, headers=bearer(key))
        assert reply.status_code == status, reply.text
        return reply.json()

    async def chat(self, text: str = "add 2 and 3", status: int = 200, key: str = "", **fields: Any) -> Any:
        """A conversation of one turn, greedy and short where nothing else is said."""
        fields = {"model": "base", "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
        messages = fields.pop("messages", [{"role": "user", "content": text}])
        return await self.post("/v1/chat/completions", status, key, messages=messages, **fields)

    async def stream(self, path: str = "/v1/chat/completions", **body: Any) -> list[Any]:
        """The events of a stream, the last of which is '[DONE]'."""
        body = {
            "model": "base",
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            **body,
        }
        if "chat" in path:
            body.setdefault("messages", [{"role": "user", "content": "add 2 and 3"}])
        reply = await self.client.post(path, json=body)
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = reply.text.split("\n\n")
        assert events.pop() == ""
        found = [event.removeprefix("data: ") for event in events]
        return [event if event == "[DONE]" else json.loads(event) for event in found]

    def without(self, unwanted: Callable[[str], bool]) -> dict[str, float]:
        """A logit_bias that forbids all tokens whose text is so."""
        tokenizer = self.service.tokenizer
        words = {i: tokenizer.decode([i], skip_special=False) for i in range(tokenizer.size)}
        return {str(token): -100.0 for token, word in words.items() if unwanted(word)}

    async def held(self) -> int:
        """Pages that requests hold."""
        now = await self.service.look()
        return now.pages - now.available


def bearer(key: str) -> dict[str, str]:
    """The header that shows a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


Serving = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serving(tiny_family_made: Path) -> Serving:
    """Starts a server: ``async with serving(max_waiting=0) as served``."""

    @asynccontextmanager
    async def start(**options: Any) -> AsyncIterator[Served]:
        out = io.StringIO()
        given = {"family": tiny_family_made, "dtype": "float32", "cache_mib": 16, **options}
        service = service_of(Settings(**given), log=Log(out))
        app = build(service, version="test")
        transport = httpx2.ASGITransport(app=app)
        async with app.router.lifespan_context(app):
            async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                yield Served(service, client, app, out)

    return start


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """The keys of KEYS as a file."""
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(KEYS), encoding="utf-8")
    return path


def run(work: Awaitable[None], *, seconds: float = 60) -> None:
    """A test on an event loop of its own, which must not hang."""

    async def soon() -> None:
        async with asyncio.timeout(seconds):
            await work

    asyncio.run(soon())


def engine_of(service: Service) -> Engine:
    """The one engine of a server that is one process."""
    assert isinstance(service.crew, Alone)
    return service.crew.worker.core.engine


class Pace:
    """Lets the engine make so many steps and no more; it still takes orders."""

    def __init__(self, engine: Engine, *, steps: float = 0) -> None:
        self.engine, self.left, self._step = engine, steps, engine.step
        engine.step = self._paced  # type: ignore[method-assign]

    def _paced(self) -> list[Piece]:
        if self.left <= 0:
            time.sleep(0.001)
            return []
        self.left -= 1
        return self._step()

    async def spent(self) -> None:
        """Until all steps are made that were allowed."""
        while self.left > 0:
            await asyncio.sleep(0.001)


async def until(condition: Callable[[], bool]) -> None:
    """Waits; the test's own time limit ends what never comes true."""
    while not condition():
        await asyncio.sleep(0.001)


async def leaving(app: Any, path: str, body: dict[str, Any], gone: asyncio.Event) -> list[Any]:
    """A client that sends a request and hangs up when ``gone`` is set; what was sent to it until then."""
    sent: list[Any] = []
    parts = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if parts:
            return parts.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    return sent


TOOLS_TEMPLATE = (
    "{% for t in tools or [] %}tool {{ t.function.name }}; {% endfor %}"
    "{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'user' }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments|tojson }}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2, 3]}, "b": {"enum": [4, 5]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="session")
def tool_family(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family of a base alone whose chat template shows tools. Read only."""
    base = make_checkpoint(seed=3)
    (base / "chat_template.jinja").write_text(TOOLS_TEMPLATE, encoding="utf-8")
    folder = tmp_path_factory.mktemp("tools") / "fam"
    init_family(folder, base)
    return folder
