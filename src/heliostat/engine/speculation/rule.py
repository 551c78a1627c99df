"""By which rule drafted tokens are taken, read from one argument; and the count of what came of them. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from heliostat.errors import Refused

Kind = Literal["lossless", "judged", "kl", "topk", "entropy"]
RULES = "lossless, judged (or judged:THETA), kl:BOUND, topk:COUNT, entropy:BOUND (or entropy:BOUND:WINDOW)"
OFF = "off"
"""What a request says that wants nothing drafted."""
WINDOW = 2
"""Drafted tokens after a doubtful one that must be the speaker's own, where nobody says how many."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When a drafted token is taken; under every rule it is where it is the token that the speaker chooses itself.

    ``lossless``: never else, so that answers are those of the speaker alone. The others take more, and change answers:
    ``judged``: a judge scores it above ``bound``; ``kl``: the divergence of the draft's distribution from the speaker's
    (nats) is below ``bound``; ``topk``: it is among the speaker's ``bound`` likeliest; ``entropy``: the speaker is
    unsure (entropy above ``bound``, as a share of the highest there can be) and the next ``window`` drafted tokens are
    its own.
    """

    kind: Kind = "lossless"
    bound: float | None = None
    """None with ``judged``: the judge's own, or the one that is called ``named``."""
    window: int = 0
    named: str = ""

    def __str__(self) -> str:
        """As ``parse_rule`` reads it."""
        found = self.named or ("" if self.bound is None else _shortest(self.bound))
        return ":".join([self.kind, *filter(None, [found, str(self.window or "")])])

    @property
    def lossless(self) -> bool:
        """Whether answers are those of the speaker alone."""
        return self.kind == "lossless"


def _shortest(bound: float) -> str:
    """The text that is read as just this number."""
    return str(int(bound)) if bound == bound // 1 and bound < math.inf else str(bound)


LOSSLESS = Rule()


@dataclass(slots=True)
class Speculated:
    """What was drafted, and what came of it, in tokens."""

    drafted: int = 0
    accepted: int = 0
    """Of these, those that became part of an answer."""
    judged: int = 0
    """Of these, those that the lossless rule would not have taken."""

    def add(self, drafted: int, accepted: int, judged: int) -> None:
        """So many more."""
        self.drafted += drafted
        self.accepted += accepted
        self.judged += judged


def parse_rule(text: str) -> Rule:
    """The rule that a text names. Refused, with all rules, for anything else."""
    kind, *values = text.strip().split(":")
    if kind == "lossless" and not values:
        return LOSSLESS
    if kind == "judged" and len(values) < 2:
        return _judged(values[0]) if values else Rule("judged")
    if kind == "kl" and len(values) == 1:
        return Rule("kl", _number(text, values[0], 0, math.inf))
    if kind == "topk" and len(values) == 1:
        return Rule("topk", _count(text, values[0]))
    if kind == "entropy" and len(values) in (1, 2):
        window = _count(text, values[1]) if len(values) == 2 else WINDOW
        return Rule("entropy", _number(text, values[0], 0, 1), window)
    raise Refused(f"no rule {text!r} for drafted tokens; there is: {RULES}")


def _judged(value: str) -> Rule:
    if value.isidentifier() and value not in ("inf", "nan"):
        return Rule("judged", named=value)
    if value == "inf":
        return Rule("judged", math.inf)
    return Rule("judged", _number(f"judged:{value}", value, 0, 1))


def _number(text: str, value: str, low: float, high: float) -> float:
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not low <= found <= high or (math.isinf(found) and found == high):
        allowed = f"{low:g} to {high:g}" if high < math.inf else f"at least {low:g}, and finite"
        raise Refused(f"the rule {text!r} needs a number ({allowed}) instead of {value!r}; there is: {RULES}")
    return found


def _count(text: str, value: str) -> int:
    if not value.isdecimal() or not 1 <= int(value) <= 2**20:
        raise Refused(
            f"the rule {text!r} needs a count of at least 1 instead of {value!r}; there is: {RULES}"
        )
    return int(value)
