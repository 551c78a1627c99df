"""Looks at a vLLM server again and again: what it says that it is, and whether it says anything. No torch."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import msgspec

from heliostat.errors import Refused
from heliostat.serve.http_line import HttpLine, Refusal
from heliostat.vllm import wire

BEAT = 1.0
"""Seconds between two looks at a server."""
PATIENCE = 10.0
"""Seconds without any word after which it is taken for lost."""

_described = msgspec.json.Decoder(wire.Described).decode


class Watch:
    """Of one server; works from ``start``."""

    def __init__(self, line: HttpLine, worker: str, *, patience: float, beat: float) -> None:
        self._line, self._worker, self._patience, self._beat = line, worker, patience, beat
        self._heard = 0.0
        self.incarnation = ""
        """The life that it should be in; empty: not known yet."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Its time is this loop's."""
        self._loop = loop
        self.heard()

    def heard(self) -> None:
        """There was a word of it."""
        self._heard = self._loop.time()

    @property
    def silent(self) -> float:
        """Seconds since the last word."""
        return self._loop.time() - self._heard

    async def look(self) -> wire.Described:
        """What it says that it is. ConnectionError where it cannot be asked now, Refused where it is none of ours."""
        try:
            async with asyncio.timeout(self._patience):
                return _described(await self._line.get(wire.DESCRIBED))
        except TimeoutError as error:
            raise ConnectionError(f"no answer within {self._patience:g} s") from error
        except Refusal as refusal:
            if refusal.status in (401, 403):
                raise Refused(f"worker {self._worker!r} wants a key, or another one") from refusal
            if refusal.status == 404:
                raise Refused(
                    f"worker {self._worker!r}: what answers there says nothing of itself at {wire.DESCRIBED}; start vLLM "
                    "with the words that `heliostat cluster render` writes"
                ) from refusal
            raise ConnectionError(f"status {refusal.status}: {refusal.words}") from refusal
        except msgspec.DecodeError as error:
            raise Refused(f"worker {self._worker!r} describes itself strangely: {error}") from error

    async def used(self) -> float:
        """The part of its pages that is in use."""
        with suppress(Refusal, ValueError):
            for line in (await self._line.get("/metrics")).decode("utf-8", "replace").splitlines():
                if line.startswith("vllm:kv_cache_usage_perc"):
                    return max(0.0, min(1.0, float(line.rpartition(" ")[2])))
        return 0.0

    async def lost(self) -> str:
        """Returns when it is not there any more: why."""
        while True:
            await asyncio.sleep(self._beat)
            with suppress(ConnectionError, Refused):
                found = await self.look()
                self.heard()
                if self.incarnation and found.incarnation != self.incarnation:
                    return "the server was started anew"
            if self.silent > self._patience:
                return f"no word from the server for {self._patience:g} s"
