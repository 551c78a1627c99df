"""Whatever JSON is sent, nothing is a fault of the server, nothing stays in flight, and nothing is held."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from heliostat.serve.dialect import HARMLESS, IGNORED, ChatAsking, TextAsking
from heliostat.serve.responses import ResponsesAsking
from tests.unit.serve.conftest import Served, Serving

KINDS = (ChatAsking, TextAsking, ResponsesAsking)
NAMES = sorted(HARMLESS.keys() | IGNORED | {name for kind in KINDS for name in kind.model_fields})
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [0, 1, 2, -1, 10**30, 0.5, 1e308, "", "math", "base@v1", "required", "json_schema", "text"]
    )
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=4)
            | st.sampled_from(["type", "function", "name", "content", "role", "schema", "1"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": VALUES}
    ),
    max_size=3,
)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "model": st.sampled_from(["base", "math", "plan", "code@v1"]) | VALUES,
        "messages": TURNS | st.just([{"role": "user", "content": "add"}]),
        "input": st.text(max_size=8) | TURNS | VALUES,
        "prompt": st.text(max_size=8) | VALUES | st.lists(st.integers(0, 299), max_size=4),
        "max_tokens": st.integers(-1, 6) | VALUES,
    },
).flatmap(
    lambda body: st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3).map(
        lambda more: {**more, **body}
    )
)
ANSWERING = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
PATHS = [*ANSWERING, "/tokenize", "/detokenize", "/admin/members/math/canary"]


@dataclass
class Running:
    """A server that stays up while examples are drawn."""

    runner: asyncio.Runner
    served: Served


@pytest.fixture
def running(serving: Serving) -> Iterator[Running]:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        served = runner.run(stack.enter_async_context(serving(deadline=20)))
        yield Running(runner, served)
        runner.run(stack.aclose())


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(path=st.sampled_from(PATHS), body=BODIES)
def test_nothing_is_the_servers_fault(running: Running, path: str, body: dict[str, Any]) -> None:
    async def ask() -> None:
        served = running.served
        # Answers without an end of their own would only take time.
        body["max_tokens"] = 3 if body.get("max_tokens") is None else body["max_tokens"]
        body["max_output_tokens"] = body["max_tokens"]
        body.pop("max_completion_tokens", None)
        reply = await served.client.post(path, content=json.dumps(body))
        assert reply.status_code < 500, reply.text
        if reply.status_code >= 400:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
            assert "Traceback" not in reply.text and "/src/" not in reply.text
        assert served.service.in_flight == served.service.dispatcher.unfinished == 0
        assert await served.held() == 0

    running.runner.run(ask())


def test_the_schema_tells_of_every_route_and_field(running: Running) -> None:
    async def ask() -> None:
        schema = await running.served.get("/openapi.json")
        assert {"/v1/chat/completions", "/v1/models", "/health", "/admin/members"} <= schema["paths"].keys()
        post = schema["paths"]["/v1/chat/completions"]["post"]
        fields = post["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert fields.keys() == ChatAsking.model_fields.keys()
        assert "$ref" not in json.dumps(post)

    running.runner.run(ask())
