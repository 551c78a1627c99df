"""The form that a request asks an answer to have: tools that it may call, a schema that it must fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heliostat.engine.grammar import ANY_OBJECT
from heliostat.serve.dialect import Asking, ChatAsking, Message
from heliostat.serve.tools import turn
from heliostat.serve.trouble import Trouble, unsupported


def shown_tools(asking: ChatAsking) -> list[dict[str, Any]]:
    """The tools that the model is shown: none where it may call none."""
    choice = asking.tool_choice
    if isinstance(choice, str) and choice not in ("none", "auto", "required"):
        raise Trouble(
            400, f"tool_choice is {choice!r}; allowed are none, auto, required, or a function", "tool_choice"
        )
    if not asking.tools and choice not in (None, "none", "auto"):
        raise Trouble(400, "tool_choice asks for a call, but there are no tools", "tool_choice")
    return [] if choice == "none" else [tool.model_dump(exclude_none=True) for tool in asking.tools or ()]


def schema_of(asking: Asking, tools: Sequence[Any]) -> Mapping[str, Any] | None:
    """The JSON schema that answers must fit; None where they may be anything."""
    wanted = asking.response_format
    if wanted is None or wanted.type == "text":
        return None
    if tools:
        raise unsupported("response_format", "not together with tools, whose calls are no such JSON")
    if wanted.type == "json_object":
        return ANY_OBJECT
    schema = (wanted.json_schema or {}).get("schema")
    if not isinstance(schema, dict):
        raise Trouble(400, "response_format.json_schema.schema must be a JSON schema", "response_format")
    return schema


def turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates read them."""
    return [turn(message.model_dump(exclude_none=True), place) for place, message in enumerate(messages)]
