"""What is to be drafted, and by which rules it may be taken, as an operator says it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from heliostat.engine.speculation.rule import OFF, Rule, parse_rule
from heliostat.errors import Refused

NGRAM = "ngram"
"""What the draft is called that looks up in the text, where a module's name may stand."""
AHEAD = 8
"""Most tokens drafted for a request in a step, where nobody says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be drafted, as an operator says it. Raises Refused for a rule that there is not, or without a draft."""

    draft: str | None = None
    """A module of the family that drafts tokens, or ``ngram``; none: nothing is drafted."""
    verify: tuple[str, ...] = ()
    """When drafted tokens are taken: lossless, judged, kl:X, topk:N or entropy:X. The first rule is for requests that do
    not say, the others they may ask for; none: lossless, which is always one. All but lossless may change answers."""
    judge: str | None = None
    """Name of the judge; none: the one made for speaker and draft."""
    ahead: int = AHEAD
    """Most tokens drafted for a request in a step."""
    adaptive: bool = True
    """Draft less, or nothing, where measurements say that it is faster."""

    def __post_init__(self) -> None:
        if self.draft is None and (self.verify or self.judge):
            raise Refused(
                "there is a rule to verify by, and nothing is drafted: say --draft, a module or ngram"
            )
        kinds = {rule.kind for rule in self.rules}
        if self.draft == NGRAM and "kl" in kinds:
            raise Refused(
                f"kl compares distributions, and the draft {NGRAM!r} has none: draft with a module, or take another rule"
            )
        if self.judge is not None and "judged" not in kinds:
            raise Refused(f"judge {self.judge!r} would judge nothing: add --verify judged")

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Those that requests may ask for, the one for those that do not ask first."""
        return tuple(map(parse_rule, self.verify)) or (Rule(),)

    @property
    def module(self) -> str | None:
        """The module that drafts, by the family's name."""
        return None if self.draft in (None, NGRAM) else self.draft

    def rule(self, asked: str | None) -> Rule | None:
        """The rule for a request that says this; None: nothing is drafted for it. Refused where it may not have it."""
        if asked == OFF or (asked is None and self.draft is None):
            return None
        rule = self.rules[0] if asked is None else parse_rule(asked)
        if self.draft is None:
            raise Refused(
                f"speculation {asked!r}: nothing is drafted here; leave it out, or start with --draft"
            )
        if not rule.lossless and rule not in self.rules:
            there = ", ".join(dict.fromkeys(["lossless", *map(str, self.rules), OFF]))
            raise Refused(
                f"speculation {asked!r} is not allowed here, it could change answers; allowed is: {there} (who serves "
                f"may add --verify {asked})"
            )
        return rule
