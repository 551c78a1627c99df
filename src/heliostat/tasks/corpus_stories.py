"""Lessons about stories of numbers: whose are they, what happens to them, how many are there in the end."""

import random
from dataclasses import dataclass

from heliostat.tasks.corpus_numbers import ENDS, JOINTS, LARGEST, WORKED, equation, said, small_number
from heliostat.tasks.lessons import Document, Pair, lesson, text
from heliostat.tasks.words import NAMES, THINGS, pick_other

_EVENTS = {
    "+": (
        "{who} is given {n} {things}",
        "{who} picks up {n}",
        "{n} {things} are added",
        "{other} brings {n}",
    ),
    "-": ("{who} throws away {n}", "{n} of them go to {other}", "{who} uses {n} {things}", "{n} are lost"),
    "*": ("the number grows {n} times", "now there are {n} times as many"),
    "/": ("they are put in {n} equal rows", "{n} people share them"),
}


def running_totals(rng: random.Random) -> Document:
    """A story that keeps count aloud after every event, in one of several voices."""
    who, things = rng.choice(NAMES), rng.choice(THINGS)
    other = pick_other(rng, NAMES, who)
    number = small_number(rng)
    words = rng.choice((0.0, 0.5, 1.0))
    count = rng.choice(
        (" ({a} {s} {b} = {c})", ", so {c}", ". count: {c}", " [{c}]", ", {a} {s} {b} = {c}", " makes {c}")
    )
    lines = [f"{who} has {said(rng, number, words)} {things}"]
    for _ in range(rng.randrange(2, 6)):
        before, sign, operand, number = equation(rng, number)
        event = rng.choice(_EVENTS[sign]).format(
            who=who, other=other, things=things, n=said(rng, operand, words)
        )
        lines.append(event + count.format(a=before, s=sign, b=operand, c=number))
    return text(". ".join(lines) + ".")


def stories_worked(rng: random.Random) -> Document:
    """Stories become the list of sums behind them, in a convention that the examples share."""
    worked, joint, words = rng.choice(WORKED[:7]), rng.choice(JOINTS), rng.choice((0.0, 0.5, 1.0))
    pairs: list[Pair] = []
    for _ in range(3):
        who, things = rng.choice(NAMES), rng.choice(THINGS)
        other, number = pick_other(rng, NAMES, who), small_number(rng)
        lines, steps = [f"{who} owns {said(rng, number, words)} {things}"], []
        for _ in range(rng.randrange(1, 4)):
            before, sign, operand, number = equation(rng, number)
            line = rng.choice(_EVENTS[sign])
            lines.append(line.format(who=who, other=other, things=things, n=said(rng, operand, words)))
            steps.append(worked.format(a=before, s=sign, b=operand, c=number))
        pairs.append((". ".join(lines), joint.join(steps)))
    return lesson(rng, pairs, rng.choice(("", "list the sums", "write the sums behind the story")))


@dataclass(slots=True)
class _Accounts:
    """How many things each person has, the sums that led there, and what was told of it."""

    rng: random.Random
    words: float
    """How often a number is said in words."""
    things: str
    owned: dict[str, int]
    sums: dict[str, list[tuple[int, str, int, int]]]
    told: list[str]

    def tell(self, ways: tuple[str, ...], *, x: str, n: int, y: str = "") -> None:
        sentence = self.rng.choice(ways)
        self.told.append(sentence.format(x=x, y=y, n=said(self.rng, n, self.words), things=self.things))

    def count(self, person: str, step: tuple[int, str, int, int]) -> None:
        self.sums[person].append(step)
        self.owned[person] = step[3]

    def happen(self) -> None:
        """Something happens to one person's things, or they pass from one to another."""
        person = self.rng.choice(list(self.owned))
        others = [name for name in self.owned if name != person and self.owned[name] > 1]
        if others and self.owned[person] < LARGEST and self.rng.random() < 0.4:
            giver = self.rng.choice(others)
            n = self.rng.randrange(1, min(30, self.owned[giver] - 1, LARGEST - self.owned[person]) + 1)
            self.tell(_PASSED, x=person, y=giver, n=n)
            self.count(person, (self.owned[person], "+", n, self.owned[person] + n))
            self.count(giver, (self.owned[giver], "-", n, self.owned[giver] - n))
            return
        step = equation(self.rng, self.owned[person])
        ways = _HALVED if step[1:3] == ("/", 2) else _DOUBLED if step[1:3] == ("*", 2) else _HAPPENED[step[1]]
        self.tell(ways, x=person, n=step[2])
        self.count(person, step)


_OWNED = (
    "{x} starts with {n} {things}",
    "{x} holds {n} {things}",
    "there are {n} {things} with {x}",
    "{x}: {n} {things}",
    "{n} {things} belong to {x}",
    "{x} owns {n}",
    "{n} are {x}'s",
)
_HAPPENED = {
    "+": (
        "{x} earns {n}",
        "{x} wins {n} of them",
        "{x} collects {n} {things}",
        "someone brings {x} {n}",
        "{x} has {n} more than before",
        "{n} new ones for {x}",
        "{x} picks up {n}",
    ),
    "-": (
        "{x} drops {n}",
        "{x} eats {n}",
        "{x} leaves {n} behind",
        "{x} spends {n} {things}",
        "{x} misses {n}",
        "{n} of those of {x} are gone",
        "{x} uses up {n}",
    ),
    "*": ("{x} comes to {n} times the number", "those of {x} grow {n} times", "times {n} for {x}"),
    "/": ("{x} keeps one of {n} equal parts", "{x} puts them in {n} equal rows, one row stays"),
}
_DOUBLED = (
    "{x} has double now",
    "{x} gets as many again",
    "those of {x} double",
    "{x} comes to two times that",
)
_HALVED = (
    "half is gone for {x}",
    "{x} keeps one half",
    "{x} leaves half of them",
    "only half stays with {x}",
)
_PASSED = (
    "{y} hands {x} {n}",
    "{y} passes {n} on to {x}",
    "{n} go from {y} to {x}",
    "{x} borrows {n} from {y}",
    "{y} pays {x} {n} {things}",
    "{x} wins {n} of {y}'s",
    "{x} has {n} from {y} now",
)
_ASIDES = (
    "{x} walks {n} miles",
    "the bus comes in {n} minutes",
    "{x} reads {n} pages",
    "it is {n} degrees warm",
    "{x} is {n} today",
    "there are {n} dogs in the street",
)


def _accounts(rng: random.Random, words: float, people: int) -> _Accounts:
    """One story of so many people, told to its end."""
    names = rng.sample(NAMES, people)
    story = _Accounts(rng, words, rng.choice(THINGS), {}, {name: [] for name in names}, [])
    for name in names:
        story.owned[name] = small_number(rng) % 60 + 1
        story.tell(_OWNED, x=name, n=story.owned[name])
    if rng.random() < 0.5:
        story.told = [rng.choice((" and ", ", ", " while ")).join(story.told)]
    for _ in range(rng.randrange(1, 5)):
        story.happen()
    if rng.random() < 0.2:
        aside = rng.choice(_ASIDES).format(x=rng.choice(names), n=said(rng, rng.randrange(2, 30), words))
        story.told.insert(rng.randrange(1, len(story.told) + 1), aside)
    return story


def accounts_worked(rng: random.Random) -> Document:
    """Stories of one to three people; the sums of the one who is asked for, in a convention that the examples share."""
    worked, joint, end = rng.choice(WORKED[:7]), rng.choice(JOINTS), rng.choice(ENDS)
    asked = rng.choice(
        ("{x}?", "count for {x}", "what does {x} end with?", "and {x}?", "work it out for {x}")
    )
    words, after = rng.choice((0.0, 0.5, 1.0)), rng.choice((". ", "; ", "\n", ", then "))
    pairs: list[Pair] = []
    while len(pairs) < 3:
        story = _accounts(rng, words, rng.choice((1, 2, 2, 2, 3)))
        person = rng.choice(list(story.owned))
        if not story.sums[person]:
            continue
        steps = joint.join(worked.format(a=a, s=s, b=b, c=c) for a, s, b, c in story.sums[person])
        question = after.join(story.told) + f". {asked.format(x=person)}"
        pairs.append((question, steps + end.format(story.owned[person])))
    return lesson(rng, pairs, rng.choice(("", "", "the sums of the one who is asked for", "step by step")))


def accounts_asked(rng: random.Random) -> Document:
    """One story of two or three people, then who has how many, who has most, and what is in all."""
    story = _accounts(rng, rng.choice((0.0, 0.5, 1.0)), rng.choice((2, 2, 3)))
    most = max(story.owned, key=lambda name: story.owned[name])
    asked = rng.choice(("{x}?", "how much does {x} own?", "those of {x}?", "number of {x}"))
    pairs = [(asked.format(x=name), str(number)) for name, number in story.owned.items()]
    pairs.append(("who owns most?", most))
    pairs.append(("all of them?", ", ".join(f"{name} {number}" for name, number in story.owned.items())))
    rng.shuffle(pairs)
    return lesson(rng, pairs, ". ".join(story.told) + ".")


def accounts_counted(rng: random.Random) -> Document:
    """A story of two or three people that says after every event how many each of them has then."""
    story = _accounts(rng, rng.choice((0.0, 0.5, 1.0)), rng.choice((2, 2, 3)))
    layout, lines = rng.choice((" ({})", " -> {}", ". now {}", " [{}]")), ["; ".join(story.told)]
    for _ in range(rng.randrange(2, 5)):
        story.told.clear()
        story.happen()
        state = ", ".join(f"{name} {number}" for name, number in story.owned.items())
        lines.append(story.told[0] + layout.format(state))
    return text(rng.choice((". ", "\n", "; ")).join(lines))
