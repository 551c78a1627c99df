"""Answers in JSON: a schema becomes a grammar, and a grammar says which tokens an answer may go on with."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from heliostat.errors import Refused
from heliostat.model.tokenizer import Tokenizer

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
"""The schema of every JSON object."""
SCHEMA_BYTES = 64 * 1024
SCHEMA_DEPTH = 64
SCHEMA_REPEATS = 10_000
"""Sum of all minItems, maxItems and the like: each is a symbol of the grammar, before any other limit is looked at."""

_REPEATS = ("minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains")
# In steps of the compiler, so that a schema is refused or not whatever the machine: together about a second.
_LIMITS: dict[str, Any] = {"initial_lexer_fuel": 500_000, "max_grammar_size": 50_000, "verbose_errors": False}
# A model that may write white space for ever now and then does. Twenty signs are enough to indent.
_OPTIONS: Any = {
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \n\t]{0,20}",
    "lenient": False,
}


class Grammars:
    """The grammars of one tokenizer, each schema compiled once while it is among the last ``kept``. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, *, kept: int = 64) -> None:
        """Refused where llguidance is not installed, or cannot read the tokenizer."""
        try:
            import llguidance
        except ImportError as error:
            raise Refused(
                "answers by a schema need llguidance: pip install 'heliostat[structured]'"
            ) from error
        self._library, self._kept = llguidance, kept
        try:
            self._words = llguidance.LLTokenizer(
                tokenizer.backend.to_str(), eos_token=list(tokenizer.eos_ids), slices=None
            )
        except Exception as error:  # whatever a tokenizer of another kind makes it raise
            raise Refused(
                f"answers by a schema are not possible with this tokenizer: {_first_line(error)}"
            ) from error
        self._limits = llguidance.LLParserLimits(**_LIMITS)
        self._compiled: OrderedDict[str, Any] = OrderedDict()  # the one used last at the end
        self._lock = threading.Lock()

    def matcher(self, schema: Mapping[str, Any]) -> Matcher:
        """A fresh matcher for one answer; the order of a schema's properties is that of the answer's.

        Refused for a schema that is too large, wrong, or asks for what is not supported.
        """
        if not isinstance(schema, Mapping):
            raise Refused(f"a schema is a JSON object, for instance {{'type': 'object'}}, not {schema!r}")
        text = _checked(schema)
        with self._lock:
            if text not in self._compiled:
                self._compiled[text] = self._compiled_or_refused(text)
            self._compiled.move_to_end(text)
            while len(self._compiled) > self._kept:
                self._compiled.popitem(last=False)
            found = self._compiled[text]
            if isinstance(found, Refused):
                raise Refused(str(found))
            return Matcher(found.deep_copy())

    def _compiled_or_refused(self, text: str) -> Any:
        """A refusal is kept as well: the hardest schemas are refused after the most work."""
        try:
            return self._compile(text)
        except Refused as refused:
            return refused

    def _compile(self, text: str) -> Any:
        library = self._library.LLMatcher
        try:
            grammar = library.grammar_from_json_schema(text, overrides=_OPTIONS)
        except ValueError as error:
            raise Refused(f"the schema is refused: {_first_line(error)}") from error
        matcher = library(self._words, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise Refused(f"the schema is refused: {_first_line(matcher.get_error())}")
        return matcher


class Matcher:
    """How far one answer has come in its grammar (see ``request.Matcher``)."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._read: list[int] = []  # tokens that the grammar has seen

    def allowed(self, answer: Sequence[int]) -> bytes:
        """One bit a token, the lowest first: those that may follow ``answer``.

        It grows, or parts from what was asked about last. End tokens are among them exactly where the answer is whole.
        Refused where the grammar cannot go on.
        """
        # Read only now: a step that was abandoned, or replayed after preemption, never advances it twice.
        asked = list(answer)
        same = _shared(self._read, asked)
        if same < len(self._read):  # drafted tokens that were only looked at, or of a step that was abandoned
            self._inner.rollback(len(self._read) - same)
        new, self._read = asked[same:], asked
        if self._inner.consume_tokens(new):
            bits: bytes = self._inner.compute_bitmask()
        if self._inner.is_error():
            raise Refused(f"the answer cannot go on by its schema: {_first_line(self._inner.get_error())}")
        return bits


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    if other[: len(one)] == one:
        return len(one)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _checked(schema: Mapping[str, Any]) -> str:
    """The schema as a text, the same for equal ones, within the limits."""
    try:
        text = json.dumps(schema, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused(f"the schema is no JSON: {_first_line(error)}") from error
    sizes = (
        ("bytes", len(text.encode()), SCHEMA_BYTES),
        ("levels", max(depth for depth, _, _ in _items(schema)), SCHEMA_DEPTH),
        ("repetitions", sum(_repeats(key, value) for _, key, value in _items(schema)), SCHEMA_REPEATS),
    )
    for what, size, most in sizes:
        if size > most:
            raise Refused(
                f"the schema has {size} {what}; allowed are {most}: ask for less, or leave limits out"
            )
    return text


def _repeats(key: str, value: Any) -> int:
    return int(value) if key in _REPEATS and isinstance(value, (int, float)) else 0


def _items(schema: Any) -> Iterator[tuple[int, str, Any]]:
    """(depth, key, value) of everything in a schema, lists numbered; without recursion, however deep it is."""
    waiting = [(0, "", schema)]
    while waiting:
        depth, _, value = item = waiting.pop()
        yield item
        if isinstance(value, Mapping):
            waiting += [(depth + 1, str(key), inner) for key, inner in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(depth + 1, "", inner) for inner in value]


def _first_line(error: object) -> str:
    return next(iter(str(error).splitlines()), "")[:300]
