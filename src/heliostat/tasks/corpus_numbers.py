"""Lessons about numbers: words and digits, equations, chains of steps, running totals, clocks and amounts."""

import random

from heliostat.tasks.lessons import Document, Pair, lesson, text
from heliostat.tasks.words import (
    DAYS,
    NAMES,
    THINGS,
    clock,
    number_words,
    pick_other,
    random_time,
    spoken_time,
)

_DIGIT_SIGNS = {"+": "+", "-": "-", "*": "*", "/": "/"}
_SIGNS = (
    _DIGIT_SIGNS,
    {"+": "+", "-": "-", "*": "*", "/": "/"},
    {"+": "+", "-": "-", "*": "x", "/": ":"},
    {"+": "plus", "-": "minus", "*": "times", "/": "over"},
    {"+": "add", "-": "take", "*": "by", "/": "part"},
)


def small_number(rng: random.Random) -> int:
    return rng.choice(
        (rng.randrange(1, 21), rng.randrange(1, 61), rng.randrange(1, 61), rng.randrange(1, 100))
    )


def said(rng: random.Random, number: int, words: float = 0.5) -> str:
    """The number in words with that probability, else in digits."""
    return number_words(number) if rng.random() < words else str(number)


def equation(rng: random.Random, before: int | None = None) -> tuple[int, str, int, int]:
    """(before, sign, operand, after), all within 1..99, small ones more often; a division comes out even."""
    largest, operands = rng.choice(((20, 9), (60, 20), (60, 20), (60, 20), (99, 98)))
    start = rng.randrange(1, largest) if before is None else before
    largest = largest if start < largest else 99
    while True:
        sign = rng.choice("+-+-*/")
        if sign == "+" and start < largest:
            operand = rng.randrange(1, min(operands, largest - start) + 1)
            return start, "+", operand, start + operand
        if sign == "-" and start > 1:
            operand = rng.randrange(1, min(operands, start - 1) + 1)
            return start, "-", operand, start - operand
        if sign == "*" and 1 < start <= largest // 2:
            operand = rng.randrange(2, min(9, largest // start) + 1)
            return start, "*", operand, start * operand
        divisors = [k for k in range(2, 10) if start % k == 0 and start > k]
        if sign == "/" and divisors:
            operand = rng.choice(divisors)
            return start, "/", operand, start // operand


def words_and_digits(rng: random.Random) -> Document:
    pairs = []
    for _ in range(rng.randrange(4, 14)):
        number = small_number(rng) if rng.random() < 0.9 else rng.randrange(100, 1000)
        pairs.append((number_words(number), str(number)))
    if rng.random() < 0.4:
        return lesson(rng, [(digits, words) for words, digits in pairs], "write the number in words")
    return lesson(rng, pairs, rng.choice(("", "write in digits", "digits please")))


def equations(rng: random.Random) -> Document:
    """A list of sums in one style, plain digits mostly."""
    if rng.random() < 0.6:
        signs, equals, words = _DIGIT_SIGNS, " = ", 0.0
    else:
        signs, words = rng.choice(_SIGNS), rng.choice((0.0, 0.3, 1.0))
        equals = rng.choice((" -> ", " makes ", " is ", ": ", "="))
    lines = []
    for _ in range(rng.randrange(6, 13)):
        before, sign, operand, after = equation(rng)
        left = f"{said(rng, before, words)} {signs[sign]} {said(rng, operand, words)}"
        lines.append(f"{left}{equals}{said(rng, after, words == 1.0)}")
    return text(rng.choice(("\n", ", ", "; ", ". ", " ")).join(lines[: 9 if words else 16]))


def equation_chains(rng: random.Random) -> Document:
    """Rows of sums where each goes on from the last one's result."""
    joint, rows = rng.choice(_JOINTS), []
    for _ in range(rng.randrange(2, 5)):
        number, row = small_number(rng), []
        for _ in range(rng.randrange(2, 5)):
            before, sign, operand, number = equation(rng, number)
            row.append(f"{before} {sign} {operand} = {number}")
        rows.append(joint.join(row))
    return text(rng.choice(("\n", "\n\n", "\n- ")).join(rows))


def tables(rng: random.Random) -> Document:
    """One operand held fixed: 7 + 1 = 8, 7 + 2 = 9, ..."""
    fixed, sign = rng.randrange(2, 13), rng.choice("+-*/")
    rows = []
    for i in range(1, 11):
        triple = {"+": (i, fixed, i + fixed), "-": (i + fixed, fixed, i)}.get(sign)
        triple = triple or ((i, fixed, i * fixed) if sign == "*" else (i * fixed, fixed, i))
        rows.append(f"{triple[0]} {sign} {triple[1]} = {triple[2]}")
    if rng.random() < 0.3:
        rng.shuffle(rows)
    return text(rng.choice(("\n", ", ", "; ")).join(rows))


def sums_asked(rng: random.Random) -> Document:
    """A sum is asked, its result is the output, alone or in a phrase shown by the other examples."""
    signs = rng.choice(_SIGNS)
    asked = rng.choice(("{}", "what is {}?", "{} =", "compute {}", "how much is {}?", "find {}"))
    frame = rng.choice(("{}", "{}", "it is {}", "= {}", "that makes {}", "[{}]", "result {}"))
    words = rng.choice((0.0, 0.5, 1.0))
    pairs = []
    for _ in range(rng.randrange(3, 9)):
        before, sign, operand, after = equation(rng)
        left = f"{said(rng, before, words)} {signs[sign]} {said(rng, operand, words)}"
        pairs.append((asked.format(left), frame.format(after)))
    return lesson(rng, pairs)


_MOVES = {
    "+": ("add {}", "{} more", "plus {}", "up {}", "{} come in"),
    "-": ("take away {}", "{} less", "minus {}", "down {}", "{} go out"),
    "*": ("{} times that", "multiply by {}", "times {}"),
    "/": ("divide by {}", "split in {}", "one of {} parts"),
}
_WORKED = (
    "{a} {s} {b} = {c}",
    "{a} {s} {b} = {c}",
    "{a} {s} {b} = {c}",
    "{a} {s} {b} = {c}",
    "{a}{s}{b}={c}",
    "{c} (from {a} {s} {b})",
    "{a} {s} {b} is {c}",
    "-> {c}",
)
_JOINTS = (", ", "; ", "\n", " then ", " | ", ". ")
_ENDS = (
    "",
    " => {}",
    "; total {}",
    "\nresult: {}",
    " so {}",
    ". it is {}",
    " ({})",
    ". final {}",
    "\n#{}",
    ". end: {}",
)


def chains(rng: random.Random) -> Document:
    """Instructions for a running number become worked steps, in a convention that the examples share."""
    worked, joint, end = rng.choice(_WORKED), rng.choice(_JOINTS), rng.choice(_ENDS)
    opening = rng.choice(("start with {}", "{}", "take {}", "begin at {}", "we have {}"))
    words, between = rng.choice((0.0, 0.5, 1.0)), rng.choice((", ", ". ", "; ", ", then "))
    pairs: list[Pair] = []
    for _ in range(4):
        number = small_number(rng)
        moves, steps = [opening.format(said(rng, number, words))], []
        for _ in range(rng.randrange(1, 4)):
            before, sign, operand, number = equation(rng, number)
            moves.append(rng.choice(_MOVES[sign]).format(said(rng, operand, words)))
            steps.append(worked.format(a=before, s=sign, b=operand, c=number))
        pairs.append((between.join(moves), joint.join(steps) + end.format(number)))
    told = rng.choice(("", "", "work it out", "show the steps", "go step by step"))
    return lesson(rng, pairs, told)


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
    worked, joint, words = rng.choice(_WORKED[:7]), rng.choice(_JOINTS), rng.choice((0.0, 0.5, 1.0))
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


def clock_times(rng: random.Random) -> Document:
    pairs = []
    for _ in range(rng.randrange(3, 10)):
        hour, minute = random_time(rng)
        pairs.append((spoken_time(rng, hour, minute), clock(hour, minute)))
    if rng.random() < 0.3:
        return lesson(rng, [(digits, words) for words, digits in pairs], "say the time")
    return lesson(rng, pairs, rng.choice(("", "time in digits", "on the 24 hour clock", "what time is it")))


_AMOUNTS = {"half an hour": 30, "three quarters of an hour": 45, "an hour": 60, "an hour and a half": 90}
_AMOUNTS |= {"two hours": 120, "two and a half hours": 150, "a dozen": 12, "half a dozen": 6, "two dozen": 24}
_AMOUNTS |= {"three dozen": 36, "a couple of": 2, "a quarter": 25, "half": 50, "three quarters": 75}


def amounts(rng: random.Random) -> Document:
    """Amounts that have names: minutes, dozens, shares of a hundred."""
    pairs = []
    for _ in range(rng.randrange(4, 10)):
        words = rng.choice(list(_AMOUNTS))
        number = _AMOUNTS[words]
        if rng.random() < 0.5:
            hours, minutes = rng.randrange(0, 3), 5 * rng.randrange(1, 12)
            number = 60 * hours + minutes
            hour_words = ("", "an hour and ", "two hours and ")[hours]
            words = f"{hour_words}{number_words(minutes)} minutes"
        pairs.append((words, str(number)))
    return lesson(rng, pairs, rng.choice(("", "as a number", "how much is it")))


def clock_sums(rng: random.Random) -> Document:
    """A time and some minutes later or earlier, in words or on the digital clock."""
    pairs = []
    digital = rng.random() < 0.4
    later, earlier = rng.choice((("{t} + {m}", "{t} - {m}"), ("{m} later than {t}", "{m} earlier than {t}")))
    for _ in range(rng.randrange(3, 8)):
        hour, minute = rng.randrange(5, 22), 5 * rng.randrange(12)
        minutes = rng.choice((10, 15, 20, 30, 30, 60, 60))
        shift = rng.choice((-1, 1)) * minutes
        told = clock(hour, minute) if digital else spoken_time(rng, hour, minute)
        amount = {30: "half an hour", 60: "an hour"}.get(minutes, f"{number_words(minutes)} minutes")
        asked = (later if shift > 0 else earlier).format(t=told, m=amount)
        pairs.append((asked, clock(*divmod(60 * hour + minute + shift, 60))))
    return lesson(rng, pairs, rng.choice(("", "what time is it", "24 hours")))


def days_in_order(rng: random.Random) -> Document:
    pairs = []
    after, before = rng.choice(
        (("after {}", "before {}"), ("{} + 1", "{} - 1"), ("next of {}", "last of {}"))
    )
    for i in rng.sample(range(7), rng.randrange(2, 6)):
        step = rng.choice((-1, 1))
        pairs.append(((after if step > 0 else before).format(DAYS[i]), DAYS[(i + step) % 7]))
    return lesson(rng, pairs, rng.choice(("", "which day")))


def timetable(rng: random.Random) -> Document:
    """A list of days and times in words and digits, then a look-up."""
    rows = {day: random_time(rng) for day in rng.sample(DAYS, rng.randrange(2, 6))}
    lines = [
        f"{day} {clock(*rows[day])}" if rng.random() < 0.5 else f"{day} {spoken_time(rng, *rows[day])}"
        for day in rows
    ]
    head = rng.choice(("plan", "times", "open", "trains")) + ": " + ", ".join(lines)
    asked = rng.sample(sorted(rows), rng.randrange(1, len(rows)))
    return lesson(rng, [(f"when on {day}?", clock(*rows[day])) for day in asked], head)
