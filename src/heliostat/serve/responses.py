"""POST /v1/responses: what it may say, read as the conversation that it is. What comes back: ``responding``.

Nothing is kept of an answer. ``store`` is taken, because clients send it without being asked; whatever would have to be
looked up later is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heliostat.serve.dialect import IGNORED, MOST_MESSAGES, MOST_TOOLS, NAME, ChatAsking, Loose
from heliostat.serve.trouble import Trouble, unsupported

ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
"""Who may speak, and what chat templates call them."""
NAMES = {"response_format": "text.format", "messages": "input", "max_tokens": "max_output_tokens"}
"""Fields of a conversation, and what they are called here."""
PASSED = (
    "model",
    "temperature",
    "top_p",
    "stream",
    "user",
    "top_k",
    "min_p",
    "seed",
    "min_tokens",
    "ignore_eos",
    "speculation",
)
"""Fields that a conversation has, too."""


class Format(Loose):
    """The form that an answer must have."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    wanted: Annotated[dict[str, Any] | None, Field(alias="schema")] = None


class TextOptions(Loose):
    """What is said of the answer's text."""

    format: Format | None = None


class FlatTool(Loose):
    """A function that an answer may call; tools of other kinds have no name, and are refused by their type."""

    type: str
    name: Annotated[str, Field(pattern=NAME)] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ResponsesAsking(Loose):
    """POST /v1/responses."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": (False,),
        "context_management": ([],),
        # There is no reasoning here, and so none to encrypt.
        "include": ([], ["reasoning.encrypted_content"]),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "reasoning": ({}, {"effort": "none"}),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }
    ignored: ClassVar[frozenset[str]] = IGNORED | {
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "stream_options",
    }

    model: str
    input: str | Annotated[list[dict[str, Any]], Field(max_length=MOST_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextOptions | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    stream: bool | None = False
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    speculation: str | None = None

    def chat(self) -> ChatAsking:
        """The same as a conversation. Raises Trouble for what cannot be one."""
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                raise unsupported(name, "no answer is kept; send the turns so far as input")
        return ChatAsking.model_validate(
            {name: getattr(self, name) for name in PASSED}
            | {
                "messages": self._turns(),
                "max_tokens": self.max_output_tokens,
                "tools": [_nested(*each) for each in enumerate(self.tools or ())] or None,
                "tool_choice": _choice(self.tool_choice),
                "response_format": self._format(),
            }
        )

    def _turns(self) -> list[dict[str, Any]]:
        first = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if isinstance(self.input, str):
            return [*first, {"role": "user", "content": self.input}]
        if not self.input:
            raise Trouble(400, "input is an empty list; it must be a text, or items", "input")
        return first + turns_of(self.input)

    def _format(self) -> dict[str, Any] | None:
        wanted = self.text.format if self.text else None
        if wanted is None:
            return None
        if wanted.type == "json_schema" and wanted.wanted is None:
            raise Trouble(400, "text.format.schema must be a JSON schema", "text.format")
        return {"type": wanted.type, "json_schema": {"name": wanted.name, "schema": wanted.wanted}}


def turns_of(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items of an input as turns; calls belong to the assistant's turn before them."""
    turns: list[dict[str, Any]] = []
    for place, item in enumerate(items):
        where, kind = f"input.{place}", item.get("type", "message")
        if kind == "message":
            turns.append(_said(item, where))
        elif kind == "function_call":
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant", "content": ""})
            turns[-1].setdefault("tool_calls", []).append(_call(item, where))
        elif kind == "function_call_output":
            output = _text(item.get("output"), f"{where}.output")
            turns.append({"role": "tool", "tool_call_id": str(item.get("call_id", "")), "content": output})
        else:
            raise unsupported(
                where, f"an item of type {kind!r}; only messages and calls of functions are read"
            )
    return turns


def _said(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Trouble(400, f"{where}.role is {role!r}; allowed are {', '.join(ROLES)}", f"{where}.role")
    return {"role": ROLES[role], "content": _text(item.get("content"), f"{where}.content")}


def _call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    name, arguments = item.get("name"), item.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, str) or not _is_json(arguments or "{}"):
        raise Trouble(400, f"{where}: a call needs a name, and arguments that are JSON in a text", where)
    function = {"name": name, "arguments": arguments}
    return {"id": str(item.get("call_id", "")), "type": "function", "function": function}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Trouble(400, f"{where} must be a text, or a list of parts that are texts", where)
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            raise unsupported(where, f"a part of type {kind!r}; only text is read")
    return "\n".join(part["text"] for part in content)


def _nested(place: int, tool: FlatTool) -> dict[str, Any]:
    if tool.type != "function":
        raise unsupported(f"tools.{place}", f"a tool of type {tool.type!r}; only functions are called")
    if tool.name is None:
        raise Trouble(400, f"tools.{place}: a function needs a name", f"tools.{place}.name")
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def _choice(choice: str | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") != "function":
        raise unsupported("tool_choice", f"type {choice.get('type')!r}; it may be a text, or name a function")
    return {"type": "function", "function": {"name": choice.get("name")}}


def renamed(trouble: Trouble) -> Trouble:
    """Trouble with a conversation, told in the words of who sent none."""
    if trouble.param in NAMES:
        trouble.message = trouble.message.replace(trouble.param, NAMES[trouble.param])
        trouble.param = NAMES[trouble.param]
    return trouble
