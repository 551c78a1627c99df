"""A schema that takes too long is refused in time, by its field, and nobody waits behind it for ever."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from heliostat.engine.grammar import Grammars
from heliostat.serve import holding
from tests.unit.serve.conftest import Serving, run, until
from tests.unit.serve.test_forms import FORMAT


class Stuck:
    """A compiler that does not come back from one schema until it is let go."""

    def __init__(self) -> None:
        self.free, self.begun = threading.Event(), 0
        self._whole = Grammars.matcher

    def matcher(self, grammars: Grammars, schema: Any) -> Any:
        self.begun += 1
        if "slow" in schema:
            self.free.wait(30)
        return self._whole(grammars, {key: value for key, value in schema.items() if key != "slow"})


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    made = Stuck()
    monkeypatch.setattr(Grammars, "matcher", lambda *given: made.matcher(*given))
    monkeypatch.setattr(holding, "SECONDS", 0.05)
    yield made
    made.free.set()


def wanted(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a"], **more}}}


def test_a_schema_that_takes_too_long_is_refused_by_name(serving: Serving, stuck: Stuck) -> None:
    async def work() -> None:
        async with serving() as served:
            fields: dict[str, Any] = {"ignore_eos": False, "max_tokens": 60}
            error = (await served.chat(status=400, response_format=wanted(slow=True), **fields))["error"]
            assert error["param"] == "response_format" and "took longer than 0.05 s" in error["message"]
            replies = await asyncio.gather(
                *(served.chat(status=429, response_format=FORMAT, **fields) for _ in range(20))
            )
            assert {reply["error"]["code"] for reply in replies} == {"schemas_busy"}
            assert stuck.begun == 1
            assert len(served.service._holding._thread._threads) == 1
            assert served.service.in_flight == served.service.dispatcher.unfinished == 0
            assert (await served.chat())["choices"], "who wants no schema does not wait"
            stuck.free.set()
            await until(lambda: served.service._holding._thread._work_queue.empty())
            reply = await served.chat(response_format=wanted(), **fields)
            assert reply["choices"][0]["message"]["content"].strip().startswith('"a')
            assert stuck.begun == 3, "here and at the worker; what was given up never ran"

    run(work())


def test_a_client_that_leaves_is_not_compiled_for(serving: Serving, stuck: Stuck) -> None:
    async def work() -> None:
        async with serving() as served:
            slow = asyncio.create_task(
                served.chat(status=400, response_format=wanted(slow=True), ignore_eos=False)
            )
            await until(lambda: stuck.begun == 1)
            asked = asyncio.create_task(served.chat(response_format=wanted(), ignore_eos=False))
            await asyncio.sleep(0)
            asked.cancel()
            await asyncio.gather(slow, asked, return_exceptions=True)
            stuck.free.set()
            assert served.service.in_flight == 0 and stuck.begun == 1

    run(work())
