"""Drafts without a model: what followed, earlier in prompt and answer, the tokens that were said last. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LONGEST, SHORTEST = 4, 2
"""So many last tokens are looked for; the longer found before the shorter."""
REACH = 8192
"""Tokens of a prompt, from its end, that are looked at: an index takes about 450 bytes for each."""


@dataclass(slots=True)
class Index:
    """Where each run of a few tokens stood last in one text, which only grows."""

    first: int = 0
    """Position of its first token in the whole."""
    tokens: list[int] = field(default_factory=list)
    _after: dict[tuple[int, ...], int] = field(default_factory=dict)
    """Run -> position of the token after it, where there is one."""

    def extend(self, tokens: Sequence[int]) -> None:
        """So many more."""
        for token in tokens:
            for count in range(SHORTEST, min(LONGEST, len(self.tokens)) + 1):
                self._after[tuple(self.tokens[-count:])] = len(self.tokens)
            self.tokens.append(token)

    def look_up(self, most: int) -> list[int]:
        """At most so many tokens that may come next; what follows the end is what is said of it here."""
        for count in range(min(LONGEST, len(self.tokens)), SHORTEST - 1, -1):
            place = self._after.get(tuple(self.tokens[-count:]))
            if place is not None:
                return _onward(self.tokens, place, most)
        return []


def plain_look_up(tokens: Sequence[int], most: int) -> list[int]:
    """The twin of ``Index.look_up``: reads the whole text."""
    for count in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
        last = list(tokens[-count:])
        for place in range(len(tokens) - 1, count - 1, -1):
            if list(tokens[place - count : place]) == last:
                return _onward(tokens, place, most)
    return []


def _onward(tokens: Sequence[int], place: int, most: int) -> list[int]:
    """``most`` tokens from ``place`` on; a text that repeats itself goes on repeating."""
    period = len(tokens) - place
    return [tokens[place + number % period] for number in range(most)]
