"""Looking at a server: one that takes a connection and says nothing is not waited for without end."""

import asyncio
from typing import Any

import pytest

from heliostat.clock import run_virtual
from heliostat.serve.http_watch import Watch


class Silent:
    """A line on which nothing ever comes."""

    async def get(self, path: str) -> bytes:
        return await asyncio.get_running_loop().create_future()


def test_a_look_at_who_says_nothing_has_an_end() -> None:
    async def story() -> None:
        line: Any = Silent()
        watch = Watch(line, "w", patience=10.0, beat=1.0)
        with pytest.raises(ConnectionError, match="no answer within 10 s"):
            await watch.look()
        watch.start(asyncio.get_running_loop())
        assert "no word from the server for 10 s" in await watch.lost()
        assert asyncio.get_running_loop().time() < 40

    run_virtual(story())
