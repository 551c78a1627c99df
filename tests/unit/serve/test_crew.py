"""One worker in the server's own process: what ends some requests, what ends all, and many at once."""

import asyncio
from typing import Any

import pytest

from heliostat.errors import Refused
from heliostat.llm import LLM
from tests.unit.serve.conftest import Pace, Served, Serving, engine_of, run, until


def breaking(served: Served, monkeypatch: pytest.MonkeyPatch, error: Exception, *, aborts: str = "") -> None:
    """The next step aborts the requests of a member, and raises."""
    engine = engine_of(served.service)
    step = engine.step

    def broken() -> Any:
        if not engine.unfinished:
            return []
        monkeypatch.setattr(engine, "step", step)
        for request in list(engine.scheduler.requests):
            if request.member == aborts:
                engine.abort(request.id)
        raise error

    monkeypatch.setattr(engine, "step", broken)


def test_a_refusal_in_a_step_fails_those_it_ended_and_the_others_go_on(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with serving() as served:
            whole = await served.chat(model="solo")
            pace = Pace(engine_of(served.service))
            fields: list[dict[str, Any]] = [{"model": "math", "status": 503}, {"model": "solo"}]
            tasks = [asyncio.create_task(served.chat(**field)) for field in fields]
            await until(lambda: served.service.dispatcher.unfinished == 2)
            breaking(served, monkeypatch, Refused("member 'math' cannot answer"), aborts="math")
            pace.left = 10**6
            failed, fine = await asyncio.gather(*tasks)
            assert failed["error"]["code"] == "member_failed" and "math" in failed["error"]["message"]
            assert fine["choices"] == whole["choices"]
            assert served.service.ready and await served.held() == 0
            await served.chat(model="math")

    run(work())


def test_any_other_failure_ends_all_and_the_server_says_so(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with serving() as served:
            await served.get("/health")
            breaking(served, monkeypatch, RuntimeError("device gone: /secret"))
            error = (await served.chat(status=503, n=3))["error"]
            assert error["code"] == "engine_failed" and "secret" not in error["message"]
            assert "started again" in error["message"]
            for path in ("/health", "/ready", "/live"):
                assert await served.get(path, 503) == {"status": "failed"}
            await served.chat(status=503)
            assert served.service.in_flight == served.service.dispatcher.unfinished == 0
            await served.client.get("/metrics")
            assert "failed" in (await served.client.get("/")).text

    run(work())


def test_a_stream_that_fails_says_so_in_an_event(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with serving() as served:
            pace = Pace(engine_of(served.service), steps=3)
            streamed = asyncio.create_task(served.stream())
            await until(lambda: pace.left == 0)
            breaking(served, monkeypatch, Refused("member 'base' cannot answer"), aborts="base")
            events = await streamed
            assert events[0]["choices"] and events[-1] == "[DONE]"
            assert set(events[-2]["error"]) == {"message", "type", "param", "code"}

    run(work())


def test_many_at_once_are_what_they_are_alone(serving: Serving, tiny_family_made: Any) -> None:
    llm = LLM(tiny_family_made, dtype="float32", cache_mib=16)
    members = ["base", "solo", "math", "code", "plan"]
    prompts = [f"add {a} and {b}" for a in range(4) for b in range(3)]

    async def work() -> None:
        async with serving(max_waiting=1000) as served:
            asked = [(p, m) for p in prompts for m in members]
            wanted = llm.generate(
                [p for p, _ in asked], member=[m for _, m in asked], max_tokens=6, ignore_eos=True
            )
            replies = await asyncio.gather(*(served.chat(p, model=m, max_tokens=6) for p, m in asked))
            found = [reply["choices"][0]["message"]["content"] for reply in replies]
            assert found == [answer.text for answer in wanted]
            assert await served.held() == 0

    run(work())


def test_one_refused_choice_takes_the_others_along(serving: Serving) -> None:
    async def work() -> None:
        async with serving() as served:
            ids = [[5, 6], [5, 10**6]]
            error = (await served.post("/v1/completions", 400, model="base", prompt=ids))["error"]
            assert "token ids" in error["message"]
            assert served.service.dispatcher.unfinished == 0 and await served.held() == 0

    run(work())
