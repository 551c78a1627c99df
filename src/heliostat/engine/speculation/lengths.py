"""Whether to draft, and how many tokens for whom: by what whole steps took, and by how many were taken. No torch.

Nothing here is a number of any machine. For batches of about one size, steps with drafts and steps without are measured
whole, and the kind is taken whose tokens cost less; now and then the other one is tried for a few steps, so that its
measurements stay fresh. One slow step moves no median.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

FADING = 0.97
"""What a drafted token still weighs in a rate when the next one is seen."""
PRIOR = 4.0
"""Tokens for which everybody's rate counts in a new request's own."""
WINDOW = 32
"""Steps that are remembered of each kind."""
PLAIN, DRAFTING = 3, 8
"""Steps of each kind that are measured before it is judged: how many tokens drafts bring is a matter of luck."""
TRIAL = 32
"""Steps after which it is tried; twice as many each time that it loses again."""
RARELY = 1024
"""Steps after which it is tried at the latest."""


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


@dataclass(frozen=True, slots=True)
class Took:
    """What one step took, and what it brought."""

    seconds: float
    """All of it, drafting and text included."""
    speaking: float
    """The pass of the speaker, and choosing, in seconds."""
    rows: int
    """Of that pass, drafted tokens among them."""
    said: int
    """Tokens that were added to answers."""


@dataclass(slots=True)
class Kind:
    """The latest steps of one kind."""

    enough: int
    """Steps to judge it by."""
    steps: deque[Took] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def known(self) -> bool:
        """Whether there are enough of them."""
        return len(self.steps) >= self.enough

    def median(self, what: str) -> float:
        """Of one number of the steps."""
        return _median(getattr(took, what) for took in self.steps)

    @property
    def cost(self) -> float:
        """Seconds a token."""
        said = sum(took.said for took in self.steps)
        return self.median("seconds") * len(self.steps) / max(1, said)


@dataclass(slots=True)
class Choice:
    """Between the two kinds of steps, for batches of about one size."""

    plain: Kind = field(default_factory=lambda: Kind(PLAIN))
    drafting: Kind = field(default_factory=lambda: Kind(DRAFTING))
    passes: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """Seconds of passes of the draft."""
    verifying: dict[int, deque[float]] = field(default_factory=dict)
    """Seconds of passes of the speaker that read drafted tokens, by their rows."""
    drafts: bool = False
    """Whether the next step is one with drafts."""
    _tries: bool = False
    """Whether that is only to see what it takes."""
    _since: int = 0
    """Steps since the last trial."""
    _pause: int = TRIAL

    def learn(self, drafted: bool, took: Took) -> None:
        """A step has run."""
        own, other = (self.drafting, self.plain) if drafted else (self.plain, self.drafting)
        own.steps.append(took)
        if drafted:
            self.verifying.setdefault(took.rows, deque(maxlen=PLAIN)).append(took.speaking)
        if not own.known:
            return
        if not other.known:
            return self._try(not drafted)
        worse = own.cost > other.cost
        self._since += 1
        if self._tries or worse:
            lost = self._tries and worse
            self._pause = min(2 * self._pause, RARELY) if lost else TRIAL
            self.drafts, self._tries, self._since = drafted != worse, False, 0
        elif self._since >= self._pause:
            other.steps.clear()
            self._try(not drafted)

    def _try(self, drafts: bool) -> None:
        self.drafts, self._tries = drafts, True
        self.passes = deque(list(self.passes)[-1:], WINDOW)

    @property
    def row(self) -> float:
        """Seconds that a row more takes in a pass that reads several anyway. (Of one request the second takes more.)"""
        fastest = {rows: min(seconds) for rows, seconds in self.verifying.items() if len(seconds) > 1}
        fewest, most = min(fastest, default=0), max(fastest, default=0)
        return max(0.0, fastest[most] - fastest[fewest]) / (most - fewest) if most > fewest else 0.0

    def worth(self) -> tuple[float, float]:
        """Tokens that a row more, and a pass of the draft more, must bring: what the same time brings else."""
        costs = [kind.cost for kind in (self.plain, self.drafting) if kind.known]
        rate = 1 / min(costs) if costs else 0.0
        return self.row * rate, _median(self.passes) * rate


@dataclass(frozen=True, slots=True)
class Wish:
    """A request that decodes, and the most tokens that could be drafted for it now."""

    request: str
    most: int


@dataclass(slots=True)
class Lengths:
    """Decides, step by step, for all that decode: ``begin``, then ``decide`` if there is to be drafted, then ``learn``."""

    most: int
    """Most tokens drafted for a request in a step."""
    adaptive: bool = True
    """False: always as many as there may be."""
    everybody: Rate = field(default_factory=Rate)
    _rates: dict[str, Rate] = field(default_factory=dict)
    _choices: dict[int, Choice] = field(default_factory=dict)
    """By the size of the batch, to the next power of two."""
    _now: Choice = field(default_factory=Choice)
    _drafts: bool = False
    _catches_up: bool = False
    """Whether nothing was drafted in the step before: a draft on its own pages has more to read than it drafts."""

    def forget(self, request: str) -> None:
        """It has ended."""
        self._rates.pop(request, None)

    def taken(self, request: str, drafted: int, taken: int) -> None:
        """What came of a request's drafted tokens."""
        self._rate(request).learn(drafted, taken)
        self.everybody.learn(drafted, taken)

    def _rate(self, request: str) -> Rate:
        if request not in self._rates:
            self._rates[request] = Rate(PRIOR * self.everybody.share, PRIOR)
        return self._rates[request]

    def begin(self, requests: int) -> bool:
        """Whether anything is to be drafted in a step where so many decode."""
        self._now = self._choices.setdefault(requests.bit_length(), Choice())
        drafts = requests > 0 and (not self.adaptive or self._now.drafts)
        self._drafts, self._catches_up = drafts, drafts and not self._drafts
        return drafts

    def decide(self, wishes: Iterable[Wish]) -> dict[str, int]:
        """Tokens to draft for each that wishes; at least one, where there is to be drafted."""
        possible = {wish.request: min(wish.most, self.most) for wish in wishes if wish.most > 0}
        if not self.adaptive:
            return possible
        row, each = self._now.worth()
        shares = {name: self._rate(name).share for name in possible}
        chances, counts = dict(shares), dict.fromkeys(possible, 1)
        for depth in range(2, self.most + 1):
            # A token is as likely as all before it are, and one pass of the draft is for all that go on.
            for name in chances:
                chances[name] *= shares[name]
            chances = {name: p for name, p in chances.items() if p >= row and possible[name] >= depth}
            if not chances or sum(chances.values()) - row * len(chances) < each:
                break
            counts.update(dict.fromkeys(chances, depth))
        return counts

    def passed(self, seconds: float) -> None:
        """How long a pass of the draft took."""
        self._now.passes.append(seconds)

    def learn(self, took: Took) -> None:
        """How long the step took, in which everybody only decoded."""
        if not self._catches_up:
            self._now.learn(self._drafts, took)


def _median(numbers: Iterable[float]) -> float:
    """The middle one, the higher of two; zero of none."""
    ordered = sorted(numbers)
    return ordered[len(ordered) // 2] if ordered else 0.0
