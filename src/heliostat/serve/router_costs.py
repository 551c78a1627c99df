"""What prefilling and moving pages takes, learned from what workers report. No torch, no constants of any machine."""

from __future__ import annotations

from dataclasses import dataclass, field

FADING = 0.95
"""What a measurement still weighs when the next one comes: about the last twenty count."""
ENOUGH = 1.0
"""Weight of the measurements from which on a worker is judged by its own."""


@dataclass(slots=True)
class Line:
    """Seconds as a fixed part and a part for each unit, fitted to what was measured (weighted least squares)."""

    weight: float = 0.0
    _x: float = 0.0
    _y: float = 0.0
    _xx: float = 0.0
    _xy: float = 0.0

    def learn(self, units: float, seconds: float) -> None:
        """One more measurement; those before it fade."""
        self.weight = self.weight * FADING + 1
        self._x += (units - self._x) / self.weight
        self._y += (seconds - self._y) / self.weight
        self._xx += (units * units - self._xx) / self.weight
        self._xy += (units * seconds - self._xy) / self.weight

    def forget(self) -> None:
        """Nobody asked for this for once: it counts less, until others' measurements stand in and it is tried again."""
        self.weight *= FADING

    def at(self, units: float) -> float:
        """Seconds for so many units; both parts of the line are at least 0."""
        spread = self._xx - self._x * self._x
        through_origin = self._y / self._x if self._xx else 0.0
        if spread <= 1e-9 * self._xx:  # all alike: no more is known
            slope = through_origin
        else:
            slope = (self._xy - self._x * self._y) / spread
            slope = min(max(slope, 0.0), through_origin)
        return self._y + slope * (units - self._x)


@dataclass(slots=True)
class Costs:
    """Of one worker, or of all together."""

    prefill: Line = field(default_factory=Line)
    """By prompt tokens that were run."""
    wait: Line = field(default_factory=Line)
    """By prompt tokens that were ahead when the order was sent."""
    transfer: Line = field(default_factory=Line)
    """By bytes that came in."""


def measured(own: Line, everybody: Line, units: float) -> float | None:
    """Seconds by a worker's own line where it is fresh, else by everybody's; None where nobody has measured."""
    line = own if own.weight >= ENOUGH else everybody
    return line.at(units) if line.weight else None
