"""How many tokens to draft for whom: by how many were taken so far, and by what steps were measured to take. No torch.

Nothing here is a number of any machine: a step with drafts is weighed against one without by seconds that this very
engine took, and every now and then the other choice is tried, so that the measurements stay fresh.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

FADING = 0.9
"""What a drafted token still weighs in a rate when the next one is seen."""
NEWEST = 0.25
"""Weight of the newest measurement of a step."""
PRIOR = 2.0
"""Tokens for which everybody's rate counts in a new request's own."""
TRIAL = 32
"""Steps after which the other choice is tried once."""


@dataclass(slots=True)
class Rate:
    """Share of drafted tokens that are taken, where those before them were."""

    taken: float = 1.0
    seen: float = 1.0

    @property
    def share(self) -> float:
        """In [0, 1]."""
        return self.taken / self.seen

    def learn(self, drafted: int, taken: int) -> None:
        """So many were taken of those drafted; the first that was not is the last that was looked at."""
        for place in range(min(taken + 1, drafted)):
            self.taken = self.taken * FADING + (place < taken)
            self.seen = self.seen * FADING + 1


@dataclass(slots=True)
class Seconds:
    """Measured seconds by the number of rows: running means, and lines between them."""

    means: dict[int, float] = field(default_factory=dict)
    _known: list[int] = field(default_factory=list)
    """Numbers of rows that were measured, in order."""

    def learn(self, rows: int, seconds: float) -> None:
        """One more measurement; a clock that does not move tells nothing."""
        if seconds > 0:
            if rows not in self.means:
                insort(self._known, rows)
            before = self.means.get(rows, seconds)
            self.means[rows] = before + NEWEST * (seconds - before)

    def at(self, rows: int) -> float | None:
        """For so many rows; None where nothing was measured. Beyond what was the line from end to end goes on."""
        known = self._known
        if not known or not rows:
            return None if rows else 0.0
        place = bisect_left(known, rows)
        if place == len(known):
            first, last = known[0], known[-1]
            slope = max(0.0, self.means[last] - self.means[first]) / max(1, last - first)
            return self.means[last] + slope * (rows - last)
        if known[place] == rows or place == 0:
            return self.means[known[place]]
        low, high = known[place - 1], known[place]
        part = (rows - low) / (high - low)
        return self.means[low] + part * (self.means[high] - self.means[low])


@dataclass(frozen=True, slots=True)
class Wish:
    """A request that decodes, and the most tokens that could be drafted for it now."""

    request: str
    most: int


@dataclass(slots=True)
class Lengths:
    """Decides, step by step, for all that decode."""

    most: int
    """Most tokens drafted for a request in a step."""
    adaptive: bool = True
    """False: always as many as there may be."""
    passes: bool = True
    """Whether a draft runs passes of its own, one a token."""
    speaking: Seconds = field(default_factory=Seconds)
    """Of the pass that verifies, or only decodes, by its rows."""
    drafting: Seconds = field(default_factory=Seconds)
    """Of one pass of the draft, by its requests."""
    everybody: Rate = field(default_factory=Rate)
    _rates: dict[str, Rate] = field(default_factory=dict)
    _since: int = 0
    """Steps since the other choice was tried."""

    def forget(self, request: str) -> None:
        """It has ended."""
        self._rates.pop(request, None)

    def learn(self, request: str, drafted: int, taken: int) -> None:
        """What came of a request's drafted tokens."""
        self._rate(request).learn(drafted, taken)
        self.everybody.learn(drafted, taken)

    def _rate(self, request: str) -> Rate:
        if request not in self._rates:
            self._rates[request] = Rate(PRIOR * self.everybody.share, PRIOR)
        return self._rates[request]

    def decide(self, wishes: Iterable[Wish], *, rows: int) -> dict[str, int]:
        """Tokens to draft for each that wishes; ``rows`` a step without drafts has."""
        possible = {wish.request: min(wish.most, self.most) for wish in wishes if wish.most > 0}
        if not possible or not self.adaptive:
            return possible
        best = self._best(possible, rows)
        self._since += 1
        plain = rows in self.speaking.means
        if self._since >= TRIAL or not plain:
            self._since = 0
            # Nothing that was never measured is decided by; a rate that nobody looks at any more is.
            return {} if any(best.values()) or not plain else dict.fromkeys(possible, 1)
        return best

    def _best(self, possible: Mapping[str, int], rows: int) -> dict[str, int]:
        """Of all that may be drafted what brings most tokens a second, by what is known."""
        alone = self.speaking.at(rows)
        gains = sorted(
            (
                (self._rate(request).share ** depth, -depth, request)
                for request, most in possible.items()
                for depth in range(1, most + 1)
            ),
            reverse=True,
        )
        if alone is None:
            return dict(possible)
        best, speed = 0, rows / alone
        tokens, own, at_depth = float(rows), 0.0, [0] * (self.most + 1)
        for count, (gain, depth, _) in enumerate(gains, start=1):
            tokens += gain
            own -= self._drafting(at_depth[-depth])
            at_depth[-depth] += 1
            own += self._drafting(at_depth[-depth])
            seconds = (self.speaking.at(rows + count) or 0.0) + own
            if tokens / seconds > speed:
                best, speed = count, tokens / seconds
        # Of one request the first token comes before the second: the last that is among them says how many.
        return {request: -depth for _, depth, request in gains[:best]}

    def _drafting(self, requests: int) -> float:
        """Seconds of one of the draft's passes; nothing where it has none, or nobody knows."""
        return (self.drafting.at(requests) or 0.0) if self.passes else 0.0
