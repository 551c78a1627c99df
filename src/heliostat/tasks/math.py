"""The task `math`: a short story of one to three sums becomes a worked answer that ends in the number."""

import random
from dataclasses import dataclass

from heliostat.tasks.task import Item
from heliostat.tasks.words import ADJECTIVES, NAMES, THINGS, number_words, pick_other

# Small enough that a model of a million parameters can know the sums by heart: the story is the hard part.
_LARGEST, _OPERANDS, _FACTORS = 60, 20, 5


@dataclass(frozen=True, slots=True)
class Event:
    """One kind of event: its sum, and the sentences that tell it and ask for it; {n} is the operand."""

    operator: str
    told: tuple[str, ...]
    asked: tuple[str, ...]
    last: bool = False
    """Nothing can follow: the number is one of another thing from here on."""


_NOW = ("how many {things} does {who} have now?", "how many {things} is that?")
_LEFT = ("how many {things} are left?", "how many {things} does {who} keep?")
_EVENTS = (
    Event(
        "+",
        (
            "{who} buys {n} more",
            "{other} gives {who} {n}",
            "{who} finds {n}",
            "{n} more come from {other}",
            "then {who} gets {n}",
        ),
        _NOW,
    ),
    Event(
        "-",
        (
            "{who} gives {n} to {other}",
            "{who} loses {n}",
            "{n} get broken",
            "{other} takes {n}",
            "{who} sells {n}",
        ),
        _LEFT,
    ),
    Event("*", ("soon {who} has {n} times that", "{who} makes it {n} times as many"), _NOW),
    Event("*2", ("{who} doubles them", "soon {who} has twice as many"), _NOW),
    Event("/2", ("half of them go to {other}", "{who} sells half of them", "one half gets lost"), _LEFT),
    Event(
        "/",
        ("{who} shares them among {n} friends", "they go into {n} equal bags"),
        ("how many {things} in each share?", "how many {things} for each?"),
        last=True,
    ),
    Event("+", ("{other} has {n} more than that",), ("how many {things} does {other} have?",), last=True),
    Event("-", ("{other} has {n} fewer than that",), ("how many {things} does {other} have?",), last=True),
)
_OFTEN = (4, 4, 2, 1, 2, 2, 1, 1)
_ASIDES = ("{other} is {n} years old", "{other} has {n} cats", "it is day {n}", "a bag costs {n} coins")


@dataclass(frozen=True, slots=True)
class Step:
    """`before` <operator> `operand` = `after`."""

    event: Event
    before: int
    operand: int
    after: int

    @property
    def worked(self) -> str:
        return f"{self.before} {self.event.operator[0]} {self.operand} = {self.after}"


def _operands(event: Event, before: int) -> range | list[int]:
    """What may follow the operator so that the result is whole and within 1..60; empty if nothing may."""
    if event.operator == "+":
        return range(2, min(_OPERANDS, _LARGEST - before) + 1)
    if event.operator == "-":
        return range(2, min(_OPERANDS + 1, before))
    factors = [2] if event.operator[1:] else range(2, _FACTORS + 1)
    if event.operator[0] == "*":
        return [k for k in factors if before * k <= _LARGEST]
    return [k for k in factors if before % k == 0 and before > k]


def _steps(rng: random.Random, number: int, count: int) -> list[Step]:
    steps: list[Step] = []
    while len(steps) < count:
        event = rng.choices(_EVENTS, _OFTEN)[0]
        operands = _operands(event, number)
        if not operands or (event.last and len(steps) < count - 1):
            continue
        operand = rng.choice(operands)
        after = {"+": number + operand, "-": number - operand, "*": number * operand, "/": number // operand}
        steps.append(Step(event, number, operand, after[event.operator[0]]))
        number = steps[-1].after
    return steps


def generate(rng: random.Random) -> Item:
    """One story; its chain of equations is the fact, so no test chain is seen in training, however told."""
    things, who = rng.choice(THINGS), rng.choice(NAMES)
    other = pick_other(rng, NAMES, who)
    start = rng.randrange(3, 41)
    steps = _steps(rng, start, rng.choice((1, 2, 2, 2, 3, 3)))

    def say(sentence: str, number: int) -> str:
        said = number_words(number) if rng.random() < 0.6 else str(number)
        return sentence.format(who=who, other=other, things=things, n=said)

    colour = f"{rng.choice(ADJECTIVES)} " if rng.random() < 0.3 else ""
    told = [say(f"{{who}} has {{n}} {colour}{{things}}", start)]
    told += [say(rng.choice(step.event.told), step.operand) for step in steps]
    if rng.random() < 0.25:  # a number that has nothing to do with it
        told.insert(rng.randrange(1, len(told)), say(rng.choice(_ASIDES), rng.randrange(2, 13)))
    told.append(say(rng.choice(steps[-1].event.asked), 0))
    worked = ", ".join(step.worked for step in steps)
    return Item(". ".join(told), f"{worked}. answer: {steps[-1].after}", worked)
