"""The task `worked`: a story of sums becomes an answer worked out in free words; only the number at its end is graded.

Each sentence of an answer is drawn from several phrasings, and words within a phrasing from several, whatever the story
says: there are many right answers to one prompt. Some ways to tell a story are held out: training never shows them.
"""

import random
import re
from dataclasses import dataclass
from functools import partial

from heliostat.tasks.math import Sum
from heliostat.tasks.task import Item, Task
from heliostat.tasks.words import NAMES, THINGS, number_words

# Sums that a model of some million parameters can know by heart after minutes on one core.
_LARGEST, _OPERANDS, _FACTORS = 30, 9, 3
_STEPS = (2, 2, 3, 3, 4)
_IN_WORDS = 0.2
_CHOICE = re.compile(r"\[([^]]*)]")


@dataclass(frozen=True, slots=True)
class Event:
    """One kind of event: its sum, ways to tell it, ways that are held out, and ways to work it out."""

    operator: str
    told: tuple[str, ...]
    """{x} is the person, {n} the operand."""
    held_out: tuple[str, ...]
    """Made of words that the others have, so that only the phrase is new."""
    worked: tuple[str, ...]
    """{a} {operator} {b} = {c}; one of [these|words]."""


_EVENTS = (
    Event(
        "+",
        (
            "{x} buys {n} more",
            "{x} finds {n}",
            "then {x} gets {n} from the shop",
            "a friend gives {n} to {x}",
        ),
        ("{x} finds {n} more", "then {x} buys {n} from the shop", "{x} gets {n} more from a friend"),
        (
            "[so|then|now|after that] {x} has {a} + {b} = {c} {things}",
            "adding {b} to {a} [gives|makes|brings us to] {c}",
            "[that|this] [makes|gives] {a} + {b} = {c} [in all|together|altogether]",
            "{a} and {b} [more|new ones] [are|make] {c}",
            "[with|counting] {b} more [it is|there are|we have] {a} + {b} = {c}",
        ),
    ),
    Event(
        "-",
        (
            "{x} loses {n}",
            "{x} sells {n} to a friend",
            "{x} gives {n} to the shop",
            "{n} of them get broken",
            "then {x} throws {n} away",
        ),
        ("{x} loses {n} of them", "then {x} sells {n} of them", "{x} gives {n} to a friend"),
        (
            "[so|then|now|after that] {x} [has|keeps] {a} - {b} = {c} {things}",
            "taking {b} from {a} [leaves|gives] {c}",
            "[that|this] leaves {a} - {b} = {c} [for {x}|behind|of them]",
            "{a} [less|without] {b} [is|are] {c}",
            "[with|when] {b} [gone|fewer] [it is|there are|we have] {a} - {b} = {c}",
        ),
    ),
    Event(
        "*",
        (
            "soon {x} has {n} times as many",
            "{x} makes it {n} times as many",
            "the number grows to {n} times that",
        ),
        ("{x} makes it {n} times that", "soon {x} has {n} times that"),
        (
            "[so|then|now|after that] {x} has {a} * {b} = {c} {things}",
            "{b} times {a} [is|makes|gives] {c}",
            "[that|this] [makes|gives] {a} * {b} = {c} [in all|together|altogether]",
            "taking {a} {b} times [gives|makes|brings us to] {c}",
        ),
    ),
    Event(
        "/",
        (
            "{x} makes {n} equal parts and keeps one",
            "only one of every {n} is left",
            "{x} keeps one part of {n}",
        ),
        ("one part of {n} is left", "{x} keeps only one of every {n}"),
        (
            "[so|then|now|after that] {x} [has|keeps] {a} / {b} = {c} {things}",
            "{a} in {b} parts [is|are|gives] {c} each",
            "[that|this] leaves {a} / {b} = {c} [for {x}|behind|of them]",
            "one part [of|in] {b} [is|makes] {a} / {b} = {c}",
        ),
    ),
)
_OFTEN = (5, 5, 2, 2)
_BEGUN = ("{x} has {n} {things}", "there are {n} {things} with {x}", "{x} owns {n} {things}")
_ASKED = (
    "how many {things} does {x} have now?",
    "how many {things} are left for {x}?",
    "how many does {x} have?",
)
_OPENED = (
    "[at first|first|to begin with|at the start] {x} [has|owns|holds] {a} {things}",
    "{x} [begins|starts] with {a} {things}",
    "[we|let us] [begin|start|set out] with {a} {things}",
    "there are {a} {things} [at first|to begin with|at the start]",
)
_CLOSED = (
    "[so|therefore|in the end|all told] {x} has {c} {things}",
    "[that|this] is {c} {things} [for {x}|in the end]",
    "[there are|we have] {c} {things} [now|left|in the end]",
)


def _said(rng: random.Random, phrasings: tuple[str, ...], **words: str) -> str:
    """One of the phrasings, one word of each choice in it, and the names and numbers."""
    chosen = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), rng.choice(phrasings))
    return chosen.format(**words)


def _operands(operator: str, before: int) -> list[int]:
    """What may follow the operator so that the result is whole and within 1..30; empty if nothing may."""
    if operator in "+-":
        most = _LARGEST - before if operator == "+" else before - 1
        return list(range(2, min(_OPERANDS, most) + 1))
    fits = range(2, _FACTORS + 1)
    if operator == "*":
        return [k for k in fits if before * k <= _LARGEST]
    return [k for k in fits if before % k == 0 and before > k]


def generate(rng: random.Random, *, held_out: bool = False) -> Item:
    """One story and an answer; its sums are the fact. ``held_out``: every event is told in a way that is held out."""
    person, things, number = rng.choice(NAMES), rng.choice(THINGS), rng.randrange(3, 25)
    words = {"x": person, "things": things}

    def shown(n: int) -> str:
        return number_words(n) if rng.random() < _IN_WORDS else str(n)

    told = [_said(rng, _BEGUN, n=shown(number), **words)]
    worked = [_said(rng, _OPENED, a=str(number), **words)]
    sums: list[Sum] = []
    steps = rng.choice(_STEPS)
    while len(sums) < steps:
        event = rng.choices(_EVENTS, _OFTEN)[0]
        if not (operands := _operands(event.operator, number)):
            continue
        sums.append(step := Sum(number, event.operator, rng.choice(operands)))
        tellings = event.held_out if held_out else event.told
        told.append(_said(rng, tellings, n=shown(step.operand), **words))
        numbers = {"a": str(step.before), "b": str(step.operand), "c": str(step.after)}
        worked.append(_said(rng, event.worked, **numbers, **words))
        number = step.after
    told.append(_said(rng, _ASKED, **words))
    worked.append(_said(rng, _CLOSED, c=str(number), **words))
    completion = ". ".join(worked) + f". answer: {number}"
    return Item(". ".join(told), completion, ", ".join(map(str, sums)))


_WHAT = "a story of sums becomes an answer in free words and its number"
WORKED = Task("worked", "contains", _WHAT, generate)
HELD_OUT = Task(
    "worked", "contains", f"{_WHAT}, told in ways that are held out", partial(generate, held_out=True)
)
"""Of the same name, so that both have the same facts for testing."""
