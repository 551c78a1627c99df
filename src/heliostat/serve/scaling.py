"""How many workers of each role a stream of tokens needs: tokens a second that come, over those that a worker gets through.

Counts of requests say little, for one prompt is as much work as a hundred others, and how busy workers are says it too
late. Tokens that come in say at once what prefilling will cost now and what decoding will cost a moment later. No torch,
no clock: who asks says what time it is.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from heliostat.errors import Refused
from heliostat.serve.protocol import Role

UP_SECONDS, DOWN_SECONDS = 2.0, 30.0
"""Of tokens that are looked at before workers are added (a burst must show at once), and before any is let go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Velocity:
    """Tokens a second that one worker gets through within its limits."""

    prefill: float
    """Prompt tokens that are read."""
    decode: float
    """Answer tokens that are said."""
    network: float = math.inf
    """Prompt tokens whose pages travel to who decodes."""

    def __post_init__(self) -> None:
        if min(self.prefill, self.decode, self.network) <= 0:
            raise Refused(
                f"velocities are {self.prefill:g}, {self.decode:g} and {self.network:g} tokens a second; each must be "
                "above 0"
            )


@dataclass(slots=True)
class Scaling:
    """Watches what comes in, as totals, and says how many workers there should be."""

    velocity: Velocity
    least: int = 1
    most: int = 256
    """Of each role."""
    headroom: float = 1.2
    """Times what would just do."""
    hits: float = 0.0
    """Share of the prompt tokens that need not run."""
    _seen: deque[tuple[float, float, float]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise Refused(f"least {self.least} and most {self.most} workers: allowed is 1 <= least <= most")
        if not 0 <= self.hits < 1 or self.headroom < 1:
            raise Refused(
                f"hits {self.hits:g} (allowed is 0 to below 1) and headroom {self.headroom:g} (at least 1)"
            )

    def note(self, now: float, *, prompt: float, answer: float) -> None:
        """Tokens that have come in since the beginning: of prompts, and of the answers that were asked for."""
        self._seen.append((now, prompt, answer))
        while len(self._seen) > 2 and self._seen[1][0] <= now - DOWN_SECONDS:
            self._seen.popleft()

    def wanted(self, now: float) -> Mapping[Role, int]:
        """Workers of each role: what the last moments need, or the last half minute where that is more."""
        return {
            role: max(self._needed(role, now, span) for span in (UP_SECONDS, DOWN_SECONDS)) for role in _ROLES
        }

    def _needed(self, role: Role, now: float, span: float) -> int:
        prompt, answer = self._rates(now, span)
        if role == "prefill":
            # What is found need not run, but travels.
            workers = max(prompt * (1 - self.hits) / self.velocity.prefill, prompt / self.velocity.network)
        else:
            workers = answer / self.velocity.decode
        return min(self.most, max(self.least, math.ceil(self.headroom * workers)))

    def _rates(self, now: float, span: float) -> tuple[float, float]:
        """(prompt, answer) tokens a second over the last so many seconds."""
        if len(self._seen) < 2:
            return 0.0, 0.0
        last = self._seen[-1]
        first = next((seen for seen in reversed(self._seen) if seen[0] <= now - span), self._seen[0])
        seconds = max(last[0] - first[0], 1e-9)
        return (last[1] - first[1]) / seconds, (last[2] - first[2]) / seconds


_ROLES: tuple[Role, ...] = ("prefill", "decode")
