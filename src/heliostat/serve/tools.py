"""Tools: shown to the model by its chat template, and calls of them found in what it says.

The calls are read in the form that most templates teach: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heliostat.serve.trouble import Trouble, unsupported

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool."""

    id: str
    name: str
    arguments: str
    """JSON, as the dialect wants it: a text."""

    @property
    def body(self) -> dict[str, Any]:
        """As a message holds it."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


@dataclass(slots=True)
class Caller:
    """Takes an answer piece by piece: what is text, and what are calls. Without tools all is text."""

    listening: bool
    forced: bool = False
    """The answer is held to be one call and nothing else, without marks around it."""
    calls: list[Call] = field(default_factory=list)
    _held: str = ""

    def push(self, piece: str, *, last: bool = False) -> tuple[str, list[Call]]:
        """(text that is certain, calls that are whole); ``last``: nothing comes behind it."""
        if not self.listening:
            return piece, []
        self._held += piece
        if self.forced:
            return self._whole() if last else ("", [])
        text, found = "", list[Call]()
        while (start := self._held.find(OPEN)) >= 0:
            stop = self._held.find(CLOSE, start)
            if stop < 0:
                break
            call = _call(self._held[start + len(OPEN) : stop])
            # What is no call after all stays text: the client sees what was said.
            text += self._held[:start] if call else self._held[: stop + len(CLOSE)]
            found += [call] if call else []
            self._held = self._held[stop + len(CLOSE) :].lstrip("\n" if call else "")
        keep = 0 if last else self._open_end()
        text, self._held = text + self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self.calls += found
        return text.rstrip("\n") if found else text, found

    def _whole(self) -> tuple[str, list[Call]]:
        call = _call(self._held)
        if call is None:  # cut by max_tokens
            return self._held, []
        self.calls.append(call)
        return "", [call]

    def _open_end(self) -> int:
        """Characters at the end that may belong to a call."""
        start = self._held.find(OPEN)
        if start >= 0:
            return len(self._held) - start
        sizes = range(min(len(OPEN) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(OPEN[:size])), 0)


def _call(text: str) -> Call | None:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("name"), str):
        return None
    arguments = said.get("arguments", said.get("parameters", {}))
    told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(f"call_{secrets.token_hex(8)}", said["name"], told)


def forced_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The JSON schema of a call of one of these tools."""
    calls = [_call_schema(tool["function"]) for tool in tools]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function.get("parameters") or {"type": "object"}
    properties = {"name": {"const": function["name"]}, "arguments": arguments}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def chosen(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] | None
) -> list[Mapping[str, Any]]:
    """The tools that an answer must call one of: none, unless the choice says so."""
    if choice == "required":
        return list(tools)
    if not isinstance(choice, Mapping):
        return []
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    found = [tool for tool in tools if tool["function"]["name"] == name]
    if not found:
        there = ", ".join(tool["function"]["name"] for tool in tools)
        raise Trouble(400, f"tool_choice names the function {name!r}; there is: {there}", "tool_choice")
    return found


def turn(message: Mapping[str, Any], place: int) -> dict[str, Any]:
    """A message as templates read it: content is a text, arguments of calls are objects."""
    found = {key: value for key, value in message.items() if value is not None}
    found["content"] = _text(message.get("content"), f"messages.{place}.content")
    if "tool_calls" in found:
        found["tool_calls"] = [_opened(call, f"messages.{place}.tool_calls") for call in found["tool_calls"]]
    return found


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise unsupported(where, f"a part of type {part.get('type')!r}; only text is read")
    return "\n".join(part["text"] for part in content)


def _opened(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        raise Trouble(400, f"{where}: a call has no function", where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise Trouble(400, f"{where}: arguments is no JSON", where) from None
    return {**call, "function": {**function, "arguments": arguments}}
