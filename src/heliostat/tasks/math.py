"""The task `math`: a short story with numbers, one to three steps, becomes a worked answer that ends in the number."""

import random
from dataclasses import dataclass

from heliostat.tasks.task import Item
from heliostat.tasks.words import ADJECTIVES, NAMES, THINGS, number_words, pick_other

_LARGEST = 99


@dataclass(frozen=True, slots=True)
class Step:
    """`before` <operator> `operand` = `after`, and the sentence that tells it; {n} stands for the operand."""

    before: int
    operator: str
    operand: int
    after: int
    told: str

    @property
    def worked(self) -> str:
        return f"{self.before} {self.operator} {self.operand} = {self.after}"


_GAINS = (
    "{who} buys {n} more",
    "{other} gives {who} {n}",
    "{who} finds {n}",
    "{n} more arrive from {other}",
    "then {who} gets {n}",
)
_LOSSES = (
    "{who} gives {n} to {other}",
    "{who} loses {n}",
    "{n} get broken",
    "{other} takes {n}",
    "{who} sells {n}",
)
_TIMES = (
    "{other} has {n} times as many",
    "then {who} has {n} times that",
)
_SHARES = (
    "{who} shares them among {n} friends",
    "they go into {n} equal bags",
)
_ASKS = {
    "+": ("how many {things} does {who} have now?", "how many {things} are there?"),
    "-": ("how many {things} are left?", "how many {things} does {who} keep?"),
    "*": ("how many {things} is that?",),
    "/": ("how many {things} are in each share?", "how many {things} for each?"),
}


def _steps(rng: random.Random, start: int, count: int) -> list[Step]:
    """`count` steps whose numbers stay within 1..99 and whose divisions come out even; the last may be a division."""
    steps: list[Step] = []
    while len(steps) < count:
        before = steps[-1].after if steps else start
        operator = rng.choice("++--*/")
        if operator == "/" and len(steps) < count - 1:
            continue  # "each share" is a number of another thing: nothing can follow
        step = _step(rng, before, operator)
        if step is not None:
            steps.append(step)
    return steps


def _step(rng: random.Random, before: int, operator: str) -> Step | None:
    if operator == "+" and before < _LARGEST - 2:
        operand = rng.randrange(2, min(40, _LARGEST - before) + 1)
        return Step(before, "+", operand, before + operand, rng.choice(_GAINS))
    if operator == "-" and before > 4:
        operand = rng.randrange(2, min(40, before - 1))
        return Step(before, "-", operand, before - operand, rng.choice(_LOSSES))
    if operator == "*" and before <= 33:
        operand = rng.randrange(2, min(9, _LARGEST // before) + 1)
        return Step(before, "*", operand, before * operand, rng.choice(_TIMES))
    divisors = [k for k in range(2, 10) if before % k == 0 and before > k]
    if operator == "/" and divisors:
        operand = rng.choice(divisors)
        return Step(before, "/", operand, before // operand, rng.choice(_SHARES))
    return None


def generate(rng: random.Random) -> Item:
    """One story; its chain of equations is the fact, so no test chain is ever seen in training, whatever the story."""
    things, who = rng.choice(THINGS), rng.choice(NAMES)
    other = pick_other(rng, NAMES, who)
    start = rng.randrange(3, 50)
    steps = _steps(rng, start, rng.choice((1, 2, 2, 2, 3, 3)))

    def say(number: int) -> str:
        return number_words(number) if rng.random() < 0.6 else str(number)

    colour = f"{rng.choice(ADJECTIVES)} " if rng.random() < 0.3 else ""
    told = [f"{who} has {say(start)} {colour}{things}"]
    told += [step.told.format(who=who, other=other, n=say(step.operand)) for step in steps]
    ask = rng.choice(_ASKS[steps[-1].operator]).format(who=who, things=things)
    worked = ", ".join(step.worked for step in steps)
    return Item(f"{'. '.join(told)}. {ask}", f"{worked}. answer: {steps[-1].after}", worked)
