"""What a request may say: the OpenAI dialect's fields, their caps, and what we know but do not do."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from heliostat.engine.request import Sampling
from heliostat.serve.trouble import Trouble, unsupported

M = TypeVar("M", bound="Loose")

DEEPEST = 64
MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS, MOST_BIASES, MOST_TOOLS, MOST_MESSAGES = 64, 16, 20, 1024, 128, 4096
LONGEST_STOP = 256
Whole = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
"""A number that a message to a worker can hold."""
LIMITS = ("greater_than_equal", "less_than_equal", "too_long", "too_short")
"""Kinds of faults: what is there is of the right kind, and too much or too little."""
NAME = r"^[a-zA-Z0-9_.-]{1,64}$"
"""What a function may be called."""

HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True, False),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (0,),
    "repetition_penalty": (1,),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Fields that we know and do not do, with the values that ask for nothing; null is always one."""
IGNORED = frozenset({"store", "metadata", "service_tier", "parallel_tool_calls", "priority"})
"""Fields that change no answer, and so need no warning."""


class Loose(BaseModel):
    """A part of a request; what it does not know is kept, to be told."""

    model_config = ConfigDict(extra="allow")
    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = HARMLESS
    ignored: ClassVar[frozenset[str]] = IGNORED


class StreamOptions(Loose):
    """What a stream says beside text."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class ResponseFormat(Loose):
    """The form that an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class Asking(Loose):
    """What both kinds of completion take."""

    model: str
    max_tokens: Whole | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Whole | None = None
    logit_bias: dict[Whole, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: Whole | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    return_token_ids: bool | None = False
    timings: bool | None = False
    speculation: str | None = None

    @model_validator(mode="after")
    def _timings_have_a_place(self) -> Self:
        options = self.stream_options
        if self.timings and self.stream and not (options and options.include_usage):
            text = "timings are told with the usage: ask for stream_options.include_usage, or for no stream"
            raise Trouble(400, text, "timings")
        return self

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def top_logprobs_wanted(self) -> int | None:
        """As Sampling takes it."""
        raise NotImplementedError

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of an answer, where somebody says."""
        return self.max_tokens

    def sampling(self, *, most: int) -> Sampling:
        """Sampling for the first choice; ``most`` tokens where the request does not say."""
        _cap("logit_bias", len(self.logit_bias or {}), MOST_BIASES)
        _cap("logprobs", self.top_logprobs_wanted or 0, MOST_LOGPROBS)
        given: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k == -1 else self.top_k,
            "min_p": self.min_p,
            # Without a seed two equal requests differ.
            "seed": secrets.randbits(63) if self.seed is None else self.seed,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "stop": self._stops(),
            "logprobs": self.top_logprobs_wanted,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "max_tokens": most if self.most_tokens is None else self.most_tokens,
        }
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    def _stops(self) -> tuple[str, ...]:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        _cap("stop", len(stops), MOST_STOPS)
        _cap("stop", max(map(len, stops), default=0), LONGEST_STOP, what="characters")
        return stops


class Message(Loose):
    """A turn of a conversation."""

    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Function(Loose):
    """What a tool is called and takes."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Loose):
    """A function that an answer may call."""

    type: Literal["function"] = "function"
    function: Function


class ChatAsking(Asking):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_logprobs_wanted(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise Trouble(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class TextAsking(Asking):
    """POST /v1/completions."""

    prompt: str | list[str] | list[Whole] | list[list[Whole]]
    logprobs: Whole | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise Trouble(
                400, "prompt is an empty list; it must be a text, token ids, or a list of them", "prompt"
            )
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TokenizeAsking(Loose):
    """POST /tokenize: a prompt, or messages."""

    model: str
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    return_token_strs: bool | None = False


class DetokenizeAsking(Loose):
    """POST /detokenize."""

    model: str
    tokens: list[Whole]


class CanaryAsking(Loose):
    """POST /admin/members/{member}/canary."""

    share: float
    source: str | None = None


class SourceAsking(Loose):
    """POST /admin/members/{member}/load and roll: which member of the family it is, if not the one named so."""

    source: str | None = None


def parse(kind: type[M], body: bytes) -> tuple[M, list[str]]:
    """(the request, names of fields nobody knows). Raises Trouble that names what is wrong."""
    content = _json(body)
    if not isinstance(content, dict):
        raise Trouble(400, f"the body is a JSON {type(content).__name__}; it must be an object")
    if b"\\ud" in body.lower():
        _refuse_half_characters(content)
    _refuse_unsupported(content, kind.harmless)
    try:
        found = kind.model_validate(content)
    except ValidationError as error:
        raise _wrong(error) from None
    unknown = sorted(set(found.model_extra or {}) - kind.harmless.keys() - kind.ignored)
    return found, unknown


def _json(body: bytes) -> Any:
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise Trouble(400, f"the body is nested deeper than {DEEPEST}") from None
    except ValueError as error:
        told = f": {error.msg}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise Trouble(400, f"the body is no JSON in UTF-8{told}") from None
    if _too_deep(content):
        raise Trouble(400, f"the body is nested deeper than {DEEPEST}")
    return content


def _refuse_half_characters(content: Mapping[str, Any]) -> None:
    """JSON can say half of a surrogate pair; no text can, and no message to a worker."""
    for name, value in content.items():
        if name == "model":
            continue  # nobody is called so: that is told where names are looked up
        try:
            json.dumps({name: value}, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            shown = name.encode("utf-8", "replace").decode()
            raise Trouble(
                400, f"{shown} holds half of a surrogate pair, which is no character", shown
            ) from None


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def _too_deep(content: Any) -> bool:
    level = [content]
    for _ in range(DEEPEST + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(content: Any) -> Iterable[Any]:
    return content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()


def _refuse_unsupported(content: Mapping[str, Any], harmless: Mapping[str, tuple[Any, ...]]) -> None:
    for name in sorted(content.keys() & harmless.keys()):
        value = content[name]
        if value is not None and value not in harmless[name]:
            raise unsupported(name, "leave it out")


def _wrong(error: ValidationError) -> Trouble:
    """The first fault, by the field's name; neither values nor links to elsewhere."""
    faults = error.errors(include_url=False, include_input=False)
    # A number too large among token ids is also no text: of a union's branches, the one that nearly fits tells more.
    first = next((fault for fault in faults if fault["type"] in LIMITS), faults[0])
    # Names of a union's branches stand among the names of fields.
    place = [str(part) for part in first["loc"] if not str(part).startswith(("list[", "str", "int", "dict["))]
    name = ".".join(place) or "the body"
    return Trouble(400 if first["type"] in LIMITS else 422, f"{name}: {first['msg']}", name)


def _cap(field: str, found: int, most: int, *, what: str = "of them") -> None:
    if found > most:
        raise Trouble(400, f"{field}: {found} {what}; at most {most} are allowed", field)
