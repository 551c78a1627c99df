"""An answer on its way out: from what workers say to the dialect's choices, chunks and usage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.dispatch_asked import Open
from heliostat.serve.protocol import Said, Sampled
from heliostat.serve.tools import Call, Caller


@dataclass(frozen=True, slots=True)
class Told:
    """What goes out together of one choice."""

    text: str
    calls: tuple[tuple[int, Call], ...]
    """(place among the choice's calls, call)."""
    tokens: tuple[Sampled, ...]
    """Those that are text."""
    ids: tuple[int, ...]
    """All that were chosen, the end token too."""
    reason: str | None
    offset: int
    """Characters told before."""
    first: bool


@dataclass(slots=True)
class Voice:
    """One choice while it is spoken."""

    caller: Caller
    ends: Sequence[int]
    """Token ids that are the end of an answer, and no part of it."""
    every: bool = False
    """Whether each token is told when it is there, also where its text is still held back."""
    text: str = ""
    reason: str | None = None
    tokens: list[Sampled] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    _untold: list[Sampled] = field(default_factory=list)
    _told: int = 0
    _began: bool = False

    def hear(self, said: Said) -> Told | None:
        """What can be told after one more token; None where it says nothing yet."""
        sampled, last = said.sampled, said.finish is not None
        self.ids.append(sampled.token)
        if not (last and sampled.token in self.ends):
            self._untold.append(sampled)
        before = len(self.caller.calls)
        text, calls = self.caller.push(said.text, last=last)
        self.reason = said.finish
        if self.reason == "stop" and self.caller.calls:
            self.reason = "tool_calls"
        ready = bool(text or calls or last)
        if not (ready or self.every):
            return None
        told = Told(
            text=text,
            calls=tuple(enumerate(calls, before)),
            tokens=tuple(self._untold) if ready else (),
            ids=tuple(self.ids[self._told :]),
            reason=self.reason,
            offset=len(self.text),
            first=not self._began,
        )
        self._told = len(self.ids)
        self.text += text
        self._began = True
        if ready:  # their places in the text are known now
            self.tokens += self._untold
            self._untold = []
        return told

    @property
    def whole(self) -> Told:
        """All that was told, at once."""
        return Told(
            text=self.text,
            calls=tuple(enumerate(self.caller.calls)),
            tokens=tuple(self.tokens),
            ids=tuple(self.ids),
            reason=self.reason,
            offset=0,
            first=True,
        )


class Shape(Protocol):
    """How one kind of completion writes a choice."""

    @property
    def prefix(self) -> str:
        """What ids begin with."""

    @property
    def whole_object(self) -> str:
        """What a whole answer calls itself; ``chunk_object`` alike."""

    @property
    def chunk_object(self) -> str: ...

    @property
    def prompt_on_top(self) -> bool:
        """Whether a prompt's ids stand beside the choices, as there is one prompt; else in each choice."""

    def choice(self, index: int, told: Told) -> dict[str, Any]:
        """A choice of a whole answer."""

    def chunk(self, index: int, told: Told) -> dict[str, Any]:
        """A choice of a chunk."""


@dataclass(frozen=True, slots=True)
class ChatShape:
    """/v1/chat/completions."""

    tokenizer: Tokenizer
    logprobs: bool
    prefix: str = "chatcmpl-"
    whole_object: str = "chat.completion"
    chunk_object: str = "chat.completion.chunk"
    prompt_on_top: bool = True

    def choice(self, index: int, told: Told) -> dict[str, Any]:
        """With a message."""
        message: dict[str, Any] = {"role": "assistant", "content": told.text or (None if told.calls else "")}
        if told.calls:
            message["tool_calls"] = [call.body for _, call in told.calls]
        return self._made(index, told, message=message)

    def chunk(self, index: int, told: Told) -> dict[str, Any]:
        """With a delta; the role comes with the first text, never alone."""
        delta: dict[str, Any] = {"role": "assistant"} if told.first else {}
        if told.text or (told.first and not told.calls):
            delta["content"] = told.text
        if told.calls:
            delta["tool_calls"] = [{"index": place, **call.body} for place, call in told.calls]
        return self._made(index, told, delta=delta)

    def _made(self, index: int, told: Told, **content: Any) -> dict[str, Any]:
        found = None
        if self.logprobs:
            found = {"content": [self._token(sampled) for sampled in told.tokens], "refusal": None}
        return {"index": index, **content, "logprobs": found, "finish_reason": told.reason}

    def _token(self, sampled: Sampled) -> dict[str, Any]:
        top = [self._chance(token, logprob) for token, logprob in sampled.top]
        return {**self._chance(sampled.token, sampled.logprob or 0.0), "top_logprobs": top}

    def _chance(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token], skip_special=False)
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}


@dataclass(frozen=True, slots=True)
class TextShape:
    """/v1/completions."""

    tokenizer: Tokenizer
    logprobs: bool
    prefix: str = "cmpl-"
    whole_object: str = "text_completion"
    chunk_object: str = "text_completion"
    prompt_on_top: bool = False

    def choice(self, index: int, told: Told) -> dict[str, Any]:
        """With a text."""
        found = self._logprobs(told) if self.logprobs else None
        return {"index": index, "text": told.text, "logprobs": found, "finish_reason": told.reason}

    chunk = choice

    def _logprobs(self, told: Told) -> dict[str, Any]:
        words = [self.tokenizer.decode([s.token], skip_special=False) for s in told.tokens]
        offsets = [told.offset + sum(map(len, words[:place])) for place in range(len(words))]
        return {
            "tokens": words,
            "token_logprobs": [finite(s.logprob or 0.0) for s in told.tokens],
            "top_logprobs": [self._top(s) for s in told.tokens],
            "text_offset": offsets,
        }

    def _top(self, sampled: Sampled) -> dict[str, float]:
        pairs = ((self.tokenizer.decode([t], skip_special=False), finite(p)) for t, p in sampled.top)
        found: dict[str, float] = {}
        for word, logprob in pairs:  # tokens that look alike: the likeliest, which comes first
            found.setdefault(word, logprob)
        return found


def finite(logprob: float) -> float:
    """JSON has no infinity: what cannot be is very unlikely."""
    return max(logprob, -9999.0)


def usage_of(requests: Sequence[Open], *, choices: int, timings: bool = False) -> Mapping[str, Any]:
    """Tokens so far. A prompt counts once, however many choices it has. ``timings``: with the seconds of each answer."""
    firsts = requests[::choices]
    prompt = sum(len(request.prompt) for request in firsts)
    answer = sum(len(request.answer) for request in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(request.cached_tokens for request in firsts)},
        **speculation_of(requests),
        **({"heliostat_timings": [request.timings for request in requests]} if timings else {}),
    }


def speculation_of(requests: Sequence[Open]) -> Mapping[str, Any]:
    """What was drafted for these requests and came of it, where anything was to be; all have one rule."""
    rule = requests[0].order.speculation if requests else None
    if rule is None:
        return {}
    counts = {
        what: sum(getattr(request.speculated, what) for request in requests)
        for what in ("drafted", "accepted", "judged")
    }
    return {"speculation": {"rule": rule, **counts}}
