"""Where prompts of different members part and why, and what moving a member's instructions to the end would win.

No torch. Instructions are known where the log tells them (a system turn that comes first, or ``role_tokens``). Else
they are guessed: what all prompts of a member begin with alike, and not those of all members. A guess cannot promise
too much: what moving it would win is counted, on the prompts as they would then be.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from heliostat.bench.counting import PAGE, Case, Counted, count
from heliostat.bench.logs import WIDTH, Log, Logged
from heliostat.engine.prefixes import common_tokens

LATEST = 4
"""Prompts of every other member that one is laid beside."""
MEMBERS = 8
"""Members that are looked at, those asked most."""
MEETINGS = 20_000
"""Most prompts that are laid beside others, evenly spread over the log."""
FEWEST = 3
"""Prompts of a member below which nothing is guessed."""


@dataclass(slots=True)
class Pair:
    """What prompts of one member had in common with the closest of another's latest."""

    member: str
    other: str
    met: int = 0
    common: int = 0
    """Tokens, summed."""
    prompt: int = 0
    """Tokens of the prompts that came, summed."""
    early: int = 0
    """How many parted before a page was full."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What is counted when the instructions of every member stand last."""

    roles: Mapping[str, int]
    """Member -> tokens of its instructions, the most frequent length."""
    guessed: bool
    counted: tuple[Counted, ...]


def pairs(log: Log, *, size: int = PAGE) -> list[Pair]:
    """Every two members that met, those asked most first."""
    latest: dict[str, deque[Logged]] = {m: deque(maxlen=LATEST) for m in log.members[:MEMBERS]}
    found: dict[tuple[str, str], Pair] = {}
    stride = max(1, len(log.requests) // MEETINGS)
    for number, came in enumerate(log.requests):
        own = latest.get(came.member)
        if own is None or came.prompt is None:
            continue
        for member, prompts in latest.items():
            if member != came.member and prompts and number % stride == 0:
                pair = found.setdefault((came.member, member), Pair(came.member, member))
                _meet(pair, came, prompts, size)
        own.append(came)
    return list(found.values())


def _meet(pair: Pair, came: Logged, prompts: Sequence[Logged] | deque[Logged], size: int) -> None:
    common = max(
        common_tokens(came.prompt or b"", other.prompt or b"") if other.kind == came.kind else 0
        for other in prompts
    )
    pair.met += 1
    pair.common += common
    pair.prompt += came.prompt_tokens
    pair.early += common < size


def moved(log: Log, cases: Sequence[Case], *, size: int = PAGE) -> Moved | None:
    """What the cases come to with instructions last; None where no member has any in front."""
    guesses = guessed_roles(log)
    lengths: dict[str, Counter[int]] = {}
    changed, guessed = [], False
    for logged in log.requests:
        role = logged.role
        if role is None and (role := guesses.get(logged.member, 0)):
            guessed = True
        changed.append(_behind(logged, role or 0))
        if role:
            lengths.setdefault(logged.member, Counter())[-(-role // WIDTH)] += 1
    if not lengths:
        return None
    roles = {member: found.most_common(1)[0][0] for member, found in lengths.items()}
    return Moved(roles, guessed, tuple(count(Log(changed), cases, size=size, flying=False)))


def _behind(logged: Logged, role: int) -> Logged:
    """The request with its first ``role`` bytes last. What it answered no longer goes on from its prompt as it was."""
    if not role or logged.prompt is None:
        return logged
    return replace(logged, prompt=logged.prompt[role:] + logged.prompt[:role])


def guessed_roles(log: Log) -> dict[str, int]:
    """Member -> bytes that all its prompts begin with, where not all members' begin so."""
    common: dict[str, bytes] = {}
    asked: Counter[str] = Counter()
    for logged in log.requests:
        if logged.prompt is None or logged.role is not None:
            continue
        before = common.get(logged.member)
        common[logged.member] = logged.prompt if before is None else _both(before, logged.prompt)
        asked[logged.member] += 1
    if len(common) < 2:
        return {}
    everybody = len(_both(*_extremes(list(common.values()))))
    if everybody // WIDTH >= PAGE:
        return {}  # a context, or one template, already stands in front of all
    return {
        member: len(head) // WIDTH * WIDTH
        for member, head in common.items()
        if asked[member] >= FEWEST and len(head) >= WIDTH
    }


def _extremes(heads: Sequence[bytes]) -> tuple[bytes, bytes]:
    """What the least and the greatest begin with alike, all do."""
    return min(heads), max(heads)


def _both(one: bytes, other: bytes) -> bytes:
    if other.startswith(one):
        return one
    return one[: WIDTH * common_tokens(one, other)]
