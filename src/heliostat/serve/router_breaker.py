"""When a worker that fails is left alone, and when it is tried again. No torch, no clock."""

from __future__ import annotations

from dataclasses import dataclass

FAILURES = 3
"""In a row, until a worker is left alone."""
FIRST_REST = 0.5
LONGEST_REST = 30.0
"""Seconds; twice as long after every trial that fails."""


@dataclass(slots=True)
class Breaker:
    """Closed while all is well, open after failures in a row, half open for one trial when its time is up."""

    failures: int = 0
    until: float = 0.0
    """Time of the next trial."""

    def fail(self, now: float) -> bool:
        """One more failure; whether it rests from now on. While it rests, what fails was sent before: that is no news."""
        if now < self.until:
            return False
        self.failures += 1
        if self.failures < FAILURES:
            return False
        rest = min(LONGEST_REST, FIRST_REST * 2 ** (self.failures - FAILURES))
        self.until = now + rest
        return True

    def due(self, now: float) -> bool:
        """Whether it may be tried; a failure of the trial opens it at once."""
        return now >= self.until

    def close(self) -> None:
        """It did what it was asked."""
        self.failures, self.until = 0, 0.0
