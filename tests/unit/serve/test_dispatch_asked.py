"""Whose fault a failed attempt is."""

import asyncio

import pytest

from heliostat.engine.request import Sampling
from heliostat.family import Row
from heliostat.serve.dispatch_asked import Attempt
from heliostat.serve.protocol import Code, Order, no
from heliostat.serve.router import Route

ORDER = Order(id="o", row=Row("base", "a", "a", "a"), digests={}, prompt=(1, 2), sampling=Sampling())


@pytest.mark.parametrize(
    ("code", "reached", "blamed"),
    [
        ("engine_failed", False, "p"),
        ("engine_failed", True, "d"),
        ("pages_lost", True, "d"),
        ("pages_gone", True, "p"),
        ("misfit", True, "p"),
        ("late", True, ""),
    ],
)
def test_who_is_blamed(code: Code, reached: bool, blamed: str) -> None:
    async def work() -> None:
        attempt = Attempt(ORDER, Route(decode="d", prefill="p", tail=0), reached=reached)
        assert attempt.blamed(no("o", code, "why")) == blamed

    asyncio.run(work())
