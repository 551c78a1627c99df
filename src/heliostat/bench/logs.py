"""Logs of requests, one JSON object a line: who was asked what and when. Read for counting; no torch.

A prompt is kept packed: token ids as four bytes each, a text as its UTF-8, whose every four bytes count as a token.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from heliostat.errors import Refused

WIDTH = 4
"""Bytes of a packed token id; about the bytes of text that a token stands for in English."""
SCHEMA = "time (seconds or ISO 8601), member, and one of prompt (token ids or text), messages, prompt_tokens"

_OTHER: Mapping[str, str] = {"role": "user", "content": "\u2402"}

Tokenize = Callable[[Any], Sequence[int]]
"""Token ids of a text, or of a list of messages."""


@dataclass(frozen=True, slots=True)
class Logged:
    """One request."""

    time: float
    """Seconds, from any beginning."""
    member: str
    prompt_tokens: int
    answer_tokens: int = 0
    prompt: bytes | None = None
    """Packed; None where the log does not hold it."""
    answer: bytes | None = None
    role: int | None = None
    """Bytes at the head of ``prompt`` that are the member's instructions, where the log says."""
    seconds: float | None = None
    """From its arrival to its end."""
    kind: str = "ids"
    """``ids`` or ``text``: prompts of different kinds have nothing in common."""
    cached_tokens: int | None = None
    """What the server did not have to run, where the log says."""


@dataclass(slots=True)
class Log:
    """All requests of a log, by time."""

    requests: list[Logged]
    skipped: int = 0
    """Lines that are no request and were left out, as was wished."""
    others: int = 0
    """Lines of a server's log that are about other things."""
    source: str = "requests"
    members: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.requests.sort(key=lambda logged: logged.time)
        asked: dict[str, int] = {}
        for logged in self.requests:
            asked[logged.member] = asked.get(logged.member, 0) + 1
        self.members = tuple(sorted(asked, key=lambda name: (-asked[name], name)))

    @property
    def with_prompts(self) -> bool:
        """Whether it can be counted what prompts have in common."""
        return all(logged.prompt is not None for logged in self.requests)

    @property
    def with_answers(self) -> bool:
        """Whether it can be counted what goes on from an answer."""
        return all(logged.answer is not None for logged in self.requests)

    @property
    def with_seconds(self) -> bool:
        """Whether it can be told what was in flight when."""
        return all(logged.seconds is not None for logged in self.requests)

    @property
    def as_text(self) -> bool:
        """Whether any tokens are estimated from bytes."""
        return any(logged.kind == "text" for logged in self.requests)


def pack(ids: Iterable[int]) -> bytes:
    """Token ids as four bytes each. Refused where one is no such number."""
    try:
        packed = array("I", ids)
    except (OverflowError, TypeError) as error:
        raise Refused(f"token ids must be whole numbers from 0 to 2^32 - 1: {error}") from error
    assert packed.itemsize == WIDTH
    return packed.tobytes()


def tokens_in(packed: bytes) -> int:
    """Tokens that packed bytes count as."""
    return -(-len(packed) // WIDTH)


def read_log(path: str | Path, *, tokenize: Tokenize | None = None, skip_bad: bool = False) -> Log:
    """A log of requests, of our client or of our server. Refused with the line where one is neither.

    ``tokenize``: texts and messages are counted in its token ids, not in bytes.
    """
    path, found, skipped, others, source = Path(path), [], 0, 0, "requests"
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    fields = json.loads(line)
                    if isinstance(fields, dict) and "event" in fields:
                        source = "server"
                        served = list(_served(fields))
                        found += served
                        others += not served
                    else:
                        found.append(_logged(fields, tokenize))
                except (Refused, ValueError, KeyError, TypeError, RecursionError) as error:
                    if not skip_bad:
                        raise Refused(_complaint(path, number, error)) from error
                    skipped += 1
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    if not found:
        raise Refused(f"{path} holds no request; a line holds {SCHEMA}")
    return Log(found, skipped, others, source)


def _complaint(path: Path, number: int, error: Exception) -> str:
    what = f"lacks {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
    return f"{path}, line {number}: {what}. A line holds {SCHEMA}; --skip-bad leaves out what does not"


def _logged(fields: Mapping[str, Any], tokenize: Tokenize | None) -> Logged:
    if not isinstance(fields, dict):
        raise ValueError("no JSON object")
    time, member = seconds_of(fields["time"]), fields["member"]
    if not isinstance(member, str) or not member:
        raise ValueError(f"member is {member!r}")
    kind, prompt, role = _prompt(fields, tokenize)
    answer = _answer(fields.get("answer"), kind, tokenize)
    counted = _whole(fields, "prompt_tokens", tokens_in(prompt) if prompt is not None else None)
    said = _whole(fields, "answer_tokens", tokens_in(answer) if answer is not None else 0)
    took = fields.get("seconds")
    return Logged(
        time=time,
        member=member,
        prompt_tokens=counted if prompt is None else tokens_in(prompt),
        answer_tokens=said,
        prompt=prompt,
        answer=answer,
        role=role,
        seconds=None if took is None else max(0.0, float(took)),
        kind=kind,
        cached_tokens=None if fields.get("cached_tokens") is None else int(fields["cached_tokens"]),
    )


def _prompt(fields: Mapping[str, Any], tokenize: Tokenize | None) -> tuple[str, bytes | None, int | None]:
    """(kind, packed prompt, bytes of it that are the member's instructions)."""
    if (turns := fields.get("messages")) is not None:
        head = [turn for turn in turns[:1] if turn["role"] in ("system", "developer")]
        if tokenize is not None:
            ids = pack(tokenize(turns))
            # As far as the same instructions before another text are written alike.
            return "ids", ids, _common(ids, pack(tokenize([*head, _OTHER]))) if head else 0
        return "text", spelled(turns).encode(), len(_turn(head[0]).encode()) if head else 0
    prompt = fields.get("prompt")
    if prompt is None:
        if "prompt_tokens" not in fields:
            raise KeyError("prompt")
        return "ids", None, None
    if isinstance(prompt, str):
        return ("ids", pack(tokenize(prompt)), None) if tokenize else ("text", prompt.encode(), None)
    role = fields.get("role_tokens")
    return "ids", pack(prompt), None if role is None else WIDTH * int(role)


def _common(one: bytes, other: bytes) -> int:
    """Bytes of whole tokens that both begin with."""
    most = min(len(one), len(other)) // WIDTH
    for place in range(most):
        if one[WIDTH * place : WIDTH * (place + 1)] != other[WIDTH * place : WIDTH * (place + 1)]:
            return WIDTH * place
    return WIDTH * most


def spelled(turns: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as one text, and the head of the answer to it: what counts is only where two differ."""
    return "".join(map(_turn, turns)) + "<|assistant|>\n"


def _turn(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    text = content if isinstance(content, str) else json.dumps(content, sort_keys=True)
    return f"<|{turn['role']}|>\n{text}<|end|>\n"


def _answer(answer: Any, kind: str, tokenize: Tokenize | None) -> bytes | None:
    if answer is None:
        return None
    if isinstance(answer, str):
        if tokenize is not None:
            return pack(tokenize(answer))
        return answer.encode() if kind == "text" else None
    return pack(answer) if kind == "ids" else None


def _whole(fields: Mapping[str, Any], name: str, otherwise: int | None) -> int:
    value = fields.get(name)
    value = otherwise if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}")
    return value


def seconds_of(time: Any) -> float:
    """Seconds since 1970, or as they are given. Refused where it is no time."""
    if isinstance(time, int | float) and not isinstance(time, bool):
        return float(time)
    try:
        moment = datetime.fromisoformat(time)
    except (TypeError, ValueError):
        raise Refused(f"time is {time!r}; it must be seconds or ISO 8601") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _served(fields: Mapping[str, Any]) -> Iterator[Logged]:
    """What a line of our server's log tells of a request: all but what was asked and answered."""
    if fields["event"] != "request" or "member" not in fields:
        return
    took = float(fields["seconds"])
    yield Logged(
        time=seconds_of(fields["time"]) - took,
        member=str(fields["member"]).partition("@")[0],
        prompt_tokens=int(fields["prompt_tokens"]),
        answer_tokens=int(fields["completion_tokens"]),
        seconds=took,
        cached_tokens=int(fields["cached_tokens"]),
    )
