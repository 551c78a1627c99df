"""The task `math`: a short story of sums about one or two people becomes a worked answer that ends in the number."""

import random
from dataclasses import dataclass

from heliostat.tasks.task import Item
from heliostat.tasks.words import ADJECTIVES, NAMES, THINGS, number_words, pick_other

# Small enough that a model of a million parameters can know most of the sums by heart. Whose things a sentence is
# about is what it finds hardest: with two people in every story full fine-tuning stays below 50 %.
_LARGEST, _OPERANDS, _FACTORS = 80, 30, 6
_TWO_PEOPLE = 0.25


@dataclass(frozen=True, slots=True)
class Event:
    """One kind of event: the sum of the one it happens to, the opposite sum of the other, and ways to tell it."""

    operator: str
    told: tuple[str, ...]
    """{x} is the one it happens to, {y} the other, {n} the operand; without {n} the operand is 2."""
    passes: bool = False
    """What the one gains the other loses."""


_EVENTS = (
    Event("+", ("{x} buys {n} more", "{x} finds {n}", "then {x} gets {n}", "{n} more come to {x}")),
    Event("-", ("{x} loses {n}", "{x} sells {n}", "{x} throws {n} away", "{n} of {x}'s get broken")),
    Event("+", ("{y} gives {n} to {x}", "{x} takes {n} from {y}", "{x} gets {n} from {y}"), passes=True),
    Event("*", ("soon {x} has {n} times that", "{x} makes it {n} times as many")),
    Event("*", ("{x} doubles the number", "soon {x} has twice as many")),
    Event("/", ("half of {x}'s get lost", "{x} sells one half")),
)
_OFTEN = (3, 3, 5, 2, 1, 2)
_ASKED = (
    "how many {things} does {x} have now?",
    "how many {things} are left for {x}?",
    "how many does {x} have?",
)
_SHARED = (
    "{x} shares them among {n} friends. how many {things} for each?",
    "{x} fills {n} bags with them. how many {things} in each?",
)
_ASIDES = ("{x} is {n} years old", "{x} has {n} cats", "it is day {n}", "a bag costs {n} coins")


@dataclass(frozen=True, slots=True)
class Sum:
    """`before` <operator> `operand` = `after`."""

    before: int
    operator: str
    operand: int

    @property
    def after(self) -> int:
        """Whole by construction: see `_operands`."""
        if self.operator in "+-":
            return self.before + (self.operand if self.operator == "+" else -self.operand)
        return self.before * self.operand if self.operator == "*" else self.before // self.operand

    def __str__(self) -> str:
        return f"{self.before} {self.operator} {self.operand} = {self.after}"


def _operands(operator: str, before: int) -> list[int]:
    """What may follow the operator so that the result is whole and within 1..80; empty if nothing may."""
    if operator in "+-":
        return list(range(2, min(_OPERANDS, _LARGEST - before if operator == "+" else before - 1) + 1))
    fits = range(2, _FACTORS + 1)
    if operator == "*":
        return [k for k in fits if before * k <= _LARGEST]
    return [k for k in fits if before % k == 0 and before > k]


@dataclass(slots=True)
class _Story:
    """What has been told so far, and the sums of each person."""

    rng: random.Random
    owned: dict[str, int]
    things: str
    told: list[str]
    sums: dict[str, list[Sum]]

    def say(self, sentence: str, *, x: str, n: int = 0) -> str:
        """The sentence with its names and its number, in words or digits."""
        other = next((name for name in self.owned if name != x), "")
        number = number_words(n) if self.rng.random() < 0.6 else str(n)
        return sentence.format(x=x, y=other, things=self.things, n=number)

    def add(self, person: str, operator: str, operand: int) -> None:
        self.sums[person].append(Sum(self.owned[person], operator, operand))
        self.owned[person] = self.sums[person][-1].after

    def happen(self) -> None:
        """One more event, if its numbers allow it."""
        event, person = self.rng.choices(_EVENTS, _OFTEN)[0], self.rng.choice(list(self.owned))
        sentence = self.rng.choice(event.told)
        operands = _operands(event.operator, self.owned[person])
        others = [name for name in self.owned if name != person] if event.passes else []
        if event.passes:
            operands = [k for k in operands if others and k in _operands("-", self.owned[others[0]])]
        if "{n}" not in sentence:
            operands = [2] if 2 in operands else []
        if not operands:
            return
        operand = self.rng.choice(operands)
        self.told.append(self.say(sentence, x=person, n=operand))
        self.add(person, event.operator, operand)
        for other in others:
            self.add(other, "-", operand)


def _begun(rng: random.Random) -> _Story:
    """Who has how many of what."""
    who = rng.choice(NAMES)
    people = [who, pick_other(rng, NAMES, who)] if rng.random() < _TWO_PEOPLE else [who]
    story = _Story(rng, {name: rng.randrange(3, 51) for name in people}, rng.choice(THINGS), [], {})
    story.sums = {name: [] for name in people}
    colour = f"{rng.choice(ADJECTIVES)} " if rng.random() < 0.2 else ""
    first = story.say(f"{{x}} has {{n}} {colour}{{things}}", x=who, n=story.owned[who])
    if len(people) == 2:
        first += story.say(" and {x} has {n}", x=people[1], n=story.owned[people[1]])
    story.told.append(first)
    return story


def generate(rng: random.Random) -> Item:
    """One story and the sums of the person it asks about; these are the fact, so no test chain is seen in training."""
    while True:
        story = _begun(rng)
        for _ in range(rng.choice((1, 2, 2, 3, 3, 3))):
            story.happen()
        if rng.random() < 0.2:  # a number that has nothing to do with it
            aside = story.say(rng.choice(_ASIDES), x=rng.choice(list(story.owned)), n=rng.randrange(2, 13))
            story.told.insert(rng.randrange(1, len(story.told) + 1), aside)
        asked = rng.choice(list(story.owned))
        shares = _operands("/", story.owned[asked])
        if shares and len(story.sums[asked]) < 3 and rng.random() < 0.2:
            story.told.append(story.say(rng.choice(_SHARED), x=asked, n=(share := rng.choice(shares))))
            story.add(asked, "/", share)
        else:
            story.told.append(story.say(rng.choice(_ASKED), x=asked))
        if story.sums[asked]:
            worked = ", ".join(str(sum_) for sum_ in story.sums[asked])
            return Item(". ".join(story.told), f"{worked}. answer: {story.owned[asked]}", worked)
