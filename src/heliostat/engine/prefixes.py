"""Where the prompts of different members part, and why one finds no page of the other. No torch.

Whenever a request comes in, its prompt is laid beside the latest prompts of every other member, and the closest of
each is counted. Prompts of different salts are never laid side by side. Memory and work are bounded.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import Literal

from heliostat.engine.request import Request

Outcome = Literal["shared", "writer", "short", "early"]
"""``shared``: whole pages are the same. Else why there is none: ``writer``: another module writes the prompt;
``short``: no page fits below the boundary of the shorter one; ``early``: they part before the first page is full."""

LONGEST = 2**14
"""Tokens of a prompt that are looked at."""
LATEST = 16
"""Prompts that are kept of a member (under a salt)."""
MOST_MEMBERS = 32
"""Members (under a salt) of which prompts are kept, the latest to ask."""
MOST_PAIRS = 256
"""Pairs that are counted, the latest to meet."""
_WIDTH = 4  # bytes of a packed token


@dataclass(slots=True)
class Meetings:
    """What was found each time that a prompt of one of two members came and the other's were known."""

    count: int = 0
    common: int = 0
    """Tokens that the two prompts began with alike, summed."""
    tokens: int = 0
    """Tokens of the prompts that came, summed."""
    shared: int = 0
    """Tokens in whole pages that are the same, summed: what need not run while the pages are there."""
    outcomes: Counter[Outcome] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Prompt:
    packed: bytes
    writer: str
    """Digest of the module that writes it."""
    boundary: int
    length: int

    @classmethod
    def of(cls, request: Request) -> _Prompt:
        tokens = request.prompt[:LONGEST]
        writer = request.digests[request.row.prompt_writer]
        return cls(struct.pack(f"<{len(tokens)}I", *tokens), writer, request.boundary, len(request.prompt))


class Prefixes:
    """Counts, for each two members, what their prompts have in common. One thread uses it."""

    def __init__(self, *, page_size: int) -> None:
        self.page_size = page_size
        self.pairs: OrderedDict[tuple[str, str], Meetings] = OrderedDict()
        """(member, member), in the order of the alphabet."""
        self._latest: OrderedDict[tuple[str, str], deque[_Prompt]] = OrderedDict()

    def meet(self, request: Request) -> None:
        """A request has come in. Further answers to the same prompt are no further request."""
        if request.sampling.choice:
            return
        came = _Prompt.of(request)
        for (salt, member), prompts in self._latest.items():
            if salt == request.salt and member != request.member:
                self._count(request.member, member, came, prompts)
        own = self._latest.setdefault((request.salt, request.member), deque(maxlen=LATEST))
        own.append(came)
        self._latest.move_to_end((request.salt, request.member))
        while len(self._latest) > MOST_MEMBERS:
            self._latest.popitem(last=False)

    def _count(self, member: str, other: str, came: _Prompt, prompts: deque[_Prompt]) -> None:
        pair = (min(member, other), max(member, other))
        meetings = self.pairs.setdefault(pair, Meetings())
        self.pairs.move_to_end(pair)
        common, closest = max(((common_tokens(came.packed, p.packed), p) for p in prompts), key=_first)
        outcome = self._outcome(came, closest, common)
        meetings.count += 1
        meetings.common += common
        meetings.tokens += came.length
        meetings.outcomes[outcome] += 1
        if outcome == "shared":
            meetings.shared += self._whole(min(common, came.boundary, closest.boundary))
        while len(self.pairs) > MOST_PAIRS:
            self.pairs.popitem(last=False)

    def _outcome(self, one: _Prompt, other: _Prompt, common: int) -> Outcome:
        if one.writer != other.writer:
            return "writer"
        if min(one.boundary, other.boundary) < self.page_size:
            return "short"
        return "shared" if self._whole(common) else "early"

    def _whole(self, tokens: int) -> int:
        return tokens // self.page_size * self.page_size


def _first(found: tuple[int, _Prompt]) -> int:
    return found[0]


def common_tokens(one: bytes, other: bytes) -> int:
    """How many tokens two packed prompts begin with alike: ever longer spans are compared, then halves of the last."""
    most, low, step = min(len(one), len(other)), 0, 16 * _WIDTH
    while low < most and one[low : low + step] == other[low : low + step]:
        low, step = low + step, 2 * step
    if low >= most:
        return most // _WIDTH
    low, high = low // _WIDTH, min(low + step, most) // _WIDTH
    while low < high:
        middle = (low + high + 1) // 2
        if one[low * _WIDTH : middle * _WIDTH] == other[low * _WIDTH : middle * _WIDTH]:
            low = middle
        else:
            high = middle - 1
    return low
