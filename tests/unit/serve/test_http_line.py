"""Asking over HTTP: whatever breaks on the way is one kind of error, also what the library has no family for."""

import asyncio

import pytest

from heliostat.serve.http_line import HttpLine, told


@pytest.mark.parametrize("url", ["http://127.0.0.1:80001", "http://[::1", "http://", "http://127.0.0.1:1"])
def test_where_nobody_can_be_asked_the_connection_broke(url: str) -> None:
    async def story() -> None:
        line = HttpLine(url)
        with pytest.raises(ConnectionError):
            await line.get("/x")
        with pytest.raises(ConnectionError):
            await line.post("/x", {})
        with pytest.raises(ConnectionError):
            async for _ in line.stream("/x", {}):
                raise AssertionError("nobody was asked")
        await line.close()

    asyncio.run(story())


def test_of_a_group_its_first_kind_is_told() -> None:
    assert told(ExceptionGroup("two ways", [ExceptionGroup("x", [OverflowError("port")])])) == "OverflowError"
