"""Answers held to a JSON schema: schemas are compiled one at a time, beside everything else, within a time limit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from heliostat.engine.grammar import Grammars
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

    async def checked(self, schema: Mapping[str, Any] | None, param: str) -> str | None:
        """A schema that answers can follow, as a text. Raises Trouble that names the field ``param``."""
        if schema is None:
            return None
        compiling = self._thread.submit(self._checked, schema)
        try:
            async with asyncio.timeout(SECONDS):
                return await asyncio.wrap_future(compiling)
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

    def _checked(self, schema: Mapping[str, Any]) -> str:
        self._grammars = self._grammars or Grammars(self._tokenizer)
        self._grammars.matcher(schema)
        return json.dumps(schema, separators=(",", ":"))
