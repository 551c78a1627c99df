"""Answers held to a JSON schema: schemas are compiled one at a time, beside everything else, within a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from heliostat.engine.grammar import Grammars
from heliostat.engine.request import Request
from heliostat.errors import Refused
from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.trouble import Trouble

SECONDS = 5.0
"""Longest that a request waits for its schema, the schemas before it included."""


class Holding:
    """One thread that compiles. What is given up before it has begun never runs, so nothing piles up behind it.

    The compiler cannot be broken off, but it counts its own steps (``engine.grammar``) and ends by itself.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._grammars: Grammars | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="schemas")

    async def hold(self, requests: Sequence[Request], schema: Mapping[str, Any] | None, param: str) -> None:
        """Have the answers follow a schema. Raises Trouble that names the field ``param``."""
        if schema is None:
            return
        compiling = self._thread.submit(self._hold, requests, schema)
        try:
            async with asyncio.timeout(SECONDS):
                await asyncio.wrap_future(compiling)
        except Refused as error:
            raise Trouble(400, str(error), param) from None
        except TimeoutError:
            if compiling.cancelled():
                raise Trouble(
                    429,
                    f"other schemas were compiled for {SECONDS:g} s; try again soon",
                    param,
                    "schemas_busy",
                    {"Retry-After": "1"},
                ) from None
            raise Trouble(
                400, f"the schema took longer than {SECONDS:g} s to compile: ask for less", param
            ) from None

    def _hold(self, requests: Sequence[Request], schema: Mapping[str, Any]) -> None:
        self._grammars = self._grammars or Grammars(self._tokenizer)
        for request in requests:
            request.matcher = self._grammars.matcher(schema)
