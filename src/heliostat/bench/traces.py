"""Public request traces as sessions to replay: lengths, times and what prompts begin with alike. No torch.

Read are Mooncake's jsonl (times in ms, lengths, ids of hashed pieces of 512 tokens) and Azure's LLM csv (times and
lengths only). Neither says who was asked: members are assigned here, from the seed and from what a prompt begins with.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from heliostat.bench.workloads import CONTENT, Assignment, Call, Part, Session, drawn
from heliostat.errors import Refused

HASHED = 512
"""Tokens that one of Mooncake's hash ids stands for."""
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Traced:
    """One request of a trace. ``hashes`` are empty where it does not say what the prompt holds."""

    time: float
    """Seconds since the first request."""
    prompt_tokens: int
    answer_tokens: int
    hashes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """How a trace is replayed."""

    members: tuple[str, ...]
    seed: int = 0
    """Of the members' places and of the ids that prompts are made of."""
    assignment: Assignment = "rotate"
    """``rotate``: the turns of a conversation go round the members; ``cast``: a conversation has one member;
    ``draw``: each request draws its member."""
    popularity: float = 0.0
    """Exponent of Zipf's law, for ``cast`` and ``draw``."""
    speed: float = 1.0
    """2: twice as many requests a second."""
    scale: float = 1.0
    """0.1: every length is a tenth, so that a small model can take it."""
    limit: int | None = None
    """Only so many requests, from the first."""
    max_length: int | None = None
    """Requests with more tokens of prompt and answer are left out, and counted."""

    def __post_init__(self) -> None:
        if not self.members:
            raise Refused("members are none: give at least one")
        if self.speed <= 0 or not 0 < self.scale <= 1:
            raise Refused(
                f"speed is {self.speed:g}, scale {self.scale:g}; allowed is above 0, and scale to 1"
            )


def read_trace(path: str | Path) -> list[Traced]:
    """The requests of a trace in the order of time. Refused, with the line, where it is neither format."""
    path = Path(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.readline()
            file.seek(0)
            found = list(_azure(path, file) if first.startswith(AZURE[0]) else _mooncake(path, file))
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error
    if not found:
        raise Refused(f"{path} holds no request")
    start = min(traced.time for traced in found)
    moved = [Traced(t.time - start, t.prompt_tokens, t.answer_tokens, t.hashes) for t in found]
    return sorted(moved, key=lambda traced: traced.time)


def _mooncake(path: Path, lines: Iterator[str]) -> Iterator[Traced]:
    for number, line in enumerate(lines, 1):
        try:
            if not line.strip():
                continue
            fields = json.loads(line)
            prompt, answer = int(fields["input_length"]), int(fields["output_length"])
            hashes = tuple(int(found) for found in fields["hash_ids"])
            if prompt < 1 or answer < 0 or len(hashes) != -(-prompt // HASHED):
                raise ValueError(f"{len(hashes)} hash_ids for {prompt} tokens")
            yield Traced(float(fields["timestamp"]) / 1000, prompt, max(1, answer), hashes)
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(
                f"{path}, line {number}: neither Mooncake's jsonl (timestamp, input_length, output_length, "
                f"hash_ids) nor Azure's csv ({', '.join(AZURE)}): {error}"
            ) from error


def _azure(path: Path, lines: Iterator[str]) -> Iterator[Traced]:
    reader = csv.DictReader(lines)
    for fields in reader:
        try:
            time, prompt, answer = (fields[name] for name in AZURE)
            # Seven digits of a second are one more than there is room for.
            seconds = datetime.fromisoformat(time.strip()[:26]).timestamp()
            yield Traced(seconds, max(1, int(prompt)), max(1, int(answer)))
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(
                f"{path}, line {reader.line_num}: not {', '.join(AZURE)} as csv: {error}"
            ) from error


def replayed(trace: Sequence[Traced], how: Replay) -> tuple[list[Session], int]:
    """(sessions of one call each, requests left out as too long). Prompts with equal hashes begin alike."""
    conversations, found, left_out = Conversations(), [], 0
    for number, traced in enumerate(trace[: how.limit]):
        conversation, turn = conversations.of(traced)
        prompt = _prompt(traced, how, number)
        answer = max(1, round(traced.answer_tokens * how.scale))
        if how.max_length is not None and len(prompt) + answer > how.max_length:
            left_out += 1
            continue
        dice = random.Random(f"{how.seed}/answer/{number}")
        call = Call(
            number=0,
            member=_member(how, number, conversation, turn),
            task="request",
            prompt=(Part("user", prompt),),
            answer_tokens=answer,
            stand_in=tuple(dice.choices(CONTENT, k=answer)),
        )
        found.append(Session(number, traced.time / how.speed, (call,), conversation))
    if not found:
        raise Refused(
            f"all {left_out} requests are longer than {how.max_length} tokens; try a smaller --scale"
        )
    return found, left_out


def _prompt(traced: Traced, how: Replay, number: int) -> tuple[int, ...]:
    """Ids made of hashes alone, so that what began alike begins alike; fresh ones where there are none."""
    size = max(1, round(HASHED * how.scale))
    count = max(1, round(traced.prompt_tokens * how.scale))
    if not traced.hashes:
        return tuple(random.Random(f"{how.seed}/prompt/{number}").choices(CONTENT, k=count))
    tokens: list[int] = []
    for piece in traced.hashes:
        tokens += random.Random(f"{how.seed}/piece/{piece}").choices(CONTENT, k=size)
    return tuple(tokens[:count])


class Conversations:
    """Which requests go on from an earlier one: they begin with all its whole pieces."""

    def __init__(self) -> None:
        self._count = 0
        self._ends: dict[int, tuple[int, int]] = {}
        """Last whole piece of a request -> (conversation, turn). One that many begin with ends none."""

    def of(self, traced: Traced) -> tuple[int, int]:
        """(number of the conversation, place of this request in it)."""
        whole = traced.hashes[: traced.prompt_tokens // HASHED]
        before = next((self._ends[piece] for piece in reversed(whole) if piece in self._ends), None)
        if before is None:
            conversation, turn = self._count, 0
            self._count += 1
        else:
            conversation, turn = before[0], before[1] + 1
        # A first piece is most often everybody's: a conversation is told by more than that.
        if len(whole) > 1:
            self._ends[whole[-1]] = conversation, turn
        return conversation, turn


def _member(how: Replay, number: int, conversation: int, turn: int) -> str:
    if how.assignment == "draw":
        return drawn(random.Random(f"{how.seed}/member/{number}"), how.members, how.popularity)
    dice = random.Random(f"{how.seed}/conversation/{conversation}")
    if how.assignment == "cast":
        return drawn(dice, how.members, how.popularity)
    return how.members[(dice.randrange(len(how.members)) + turn) % len(how.members)]
