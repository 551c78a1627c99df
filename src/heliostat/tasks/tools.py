"""The task `tools`: a spoken request, with courtesies and second thoughts, becomes one JSON tool call."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from heliostat.tasks.task import Item
from heliostat.tasks.words import (
    CHORES,
    CITIES,
    DAYS,
    GROCERIES,
    MUSIC,
    NAMES,
    NOTES,
    ROOMS,
    clock,
    number_words,
    random_time,
    spoken_time,
)


@dataclass(frozen=True, slots=True)
class Slot:
    """One argument of a call: its value in JSON and the words that say it."""

    value: str | int
    said: str


Draw = Callable[[random.Random], Slot]


def _word(words: tuple[str, ...]) -> Draw:
    return lambda rng: Slot(word := rng.choice(words), word)


def _time(rng: random.Random) -> Slot:
    hour, minute = random_time(rng)
    said = spoken_time(rng, hour, minute)
    if rng.random() < 0.75:
        return Slot(clock(hour, minute), said)
    minutes, amount = rng.choice(
        ((10, "ten minutes"), (15, "a quarter of an hour"), (30, "half an hour"), (60, "an hour"))
    )
    sign, word = rng.choice(((-1, "before"), (1, "after")))
    shifted = (60 * hour + minute + sign * minutes) % (24 * 60)
    return Slot(clock(*divmod(shifted, 60)), f"{amount} {word} {said}")


def _day(rng: random.Random) -> Slot:
    i = rng.randrange(7)
    if rng.random() < 0.8:
        return Slot(DAYS[i], DAYS[i])
    step, word = rng.choice(((-1, "before"), (1, "after")))
    return Slot(DAYS[(i + step) % 7], f"the day {word} {DAYS[i]}")


def _minutes(rng: random.Random) -> Slot:
    named = {30: "half an hour", 45: "three quarters of an hour", 60: "an hour", 90: "an hour and a half"}
    named |= {120: "two hours", 150: "two and a half hours"}
    kind = rng.random()
    if kind < 0.3:
        minutes = rng.choice(list(named))
        return Slot(minutes, named[minutes])
    if kind < 0.5:
        minutes, (hours, said) = 5 * rng.randrange(1, 12), rng.choice(((1, "an hour"), (2, "two hours")))
        return Slot(60 * hours + minutes, f"{said} and {number_words(minutes)} minutes")
    minutes = rng.randrange(2, 60)
    return Slot(minutes, f"{number_words(minutes)} minutes")


def _count(rng: random.Random) -> Slot:
    if rng.random() < 0.3:
        count, said = rng.choice(
            ((12, "a dozen"), (6, "half a dozen"), (24, "two dozen"), (36, "three dozen"), (2, "a couple of"))
        )
        return Slot(count, said)
    count = rng.randrange(2, 41)
    return Slot(count, number_words(count))


def _level(rng: random.Random) -> Slot:
    if rng.random() < 0.3:
        return rng.choice(
            (Slot(50, "half"), Slot(25, "a quarter"), Slot(100, "full power"), Slot(75, "three quarters"))
        )
    level = 5 * rng.randrange(1, 20)
    return Slot(level, f"{number_words(level)} percent")


def _degrees(rng: random.Random) -> Slot:
    degrees = rng.randrange(15, 28)
    return Slot(degrees, rng.choice((f"{number_words(degrees)} degrees", number_words(degrees))))


@dataclass(frozen=True, slots=True)
class Tool:
    """A callable: its arguments in the order of the JSON, and ways to ask for it."""

    arguments: dict[str, Draw]
    ways: tuple[str, ...]


_NAME, _ROOM = _word(NAMES), _word(ROOMS)

TOOLS: dict[str, Tool] = {
    "alarm": Tool(
        {"at": _time, "day": _day},
        (
            "wake me at {at} on {day}",
            "set an alarm for {day} at {at}",
            "i have to be up by {at} on {day}",
            "on {day} i want to get up at {at}",
        ),
    ),
    "timer": Tool(
        {"minutes": _minutes, "label": _word(GROCERIES)},
        (
            "set a timer of {minutes} for the {label}",
            "the {label} needs {minutes}",
            "time the {label} for {minutes}",
            "tell me when the {label} has had {minutes}",
        ),
    ),
    "light": Tool(
        {"room": _ROOM, "level": _level},
        (
            "dim the lights in the {room} to {level}",
            "set the {room} light to {level}",
            "i want {level} of light in the {room}",
            "{level} for the lamp in the {room}",
        ),
    ),
    "heating": Tool(
        {"room": _ROOM, "celsius": _degrees},
        (
            "heat the {room} to {celsius}",
            "make it {celsius} in the {room}",
            "the {room} should be at {celsius}",
            "i am cold so set the {room} to {celsius}",
        ),
    ),
    "remind": Tool(
        {"task": _word(CHORES), "at": _time},
        (
            "remind me to {task} at {at}",
            "at {at} i have to {task}",
            "do not let me forget to {task} at {at}",
            "i need to {task} at {at} so remind me",
        ),
    ),
    "message": Tool(
        {"to": _NAME, "text": _word(NOTES)},
        (
            "tell {to} that {text}",
            "send {to} a message saying {text}",
            "let {to} know {text}",
            "write {text} to {to}",
        ),
    ),
    "music": Tool(
        {"genre": _word(MUSIC), "room": _ROOM, "volume": _level},
        (
            "play {genre} in the {room} at {volume}",
            "i want to hear some {genre} in the {room} at {volume}",
            "put on {genre} at {volume} in the {room}",
        ),
    ),
    "shopping": Tool(
        {"item": _word(GROCERIES), "count": _count},
        (
            "put {count} {item} on the list",
            "we need {count} {item}",
            "add {count} {item} to the shopping",
            "buy {count} {item}",
        ),
    ),
    "meeting": Tool(
        {"with": _NAME, "day": _day, "at": _time, "minutes": _minutes},
        (
            "meet {with} on {day} at {at} for {minutes}",
            "book {minutes} with {with} on {day} at {at}",
            "plan a talk with {with} for {day} at {at} and give it {minutes}",
        ),
    ),
    "weather": Tool(
        {"city": _word(CITIES), "day": _day},
        (
            "what is the weather in {city} on {day}",
            "will it rain in {city} on {day}",
            "do i need a coat in {city} on {day}",
            "how warm will {city} be on {day}",
        ),
    ),
}

_OPENINGS = ("please", "hey", "could you", "hello,", "so", "um,", "ok", "listen,")
_CLOSINGS = ("please", "thanks", "thank you", "if you can", "will you", "for me")
_SECOND_THOUGHTS = ("no wait,", "sorry, i mean", "no, make that", "or rather", "actually no,", "no sorry,")


def generate(rng: random.Random) -> Item:
    """One request and its call; the call is the fact, so no test call is seen in training, however worded."""
    name = rng.choice(list(TOOLS))
    tool = TOOLS[name]
    slots = {key: draw(rng) for key, draw in tool.arguments.items()}
    said, afterthought = {key: slot.said for key, slot in slots.items()}, ""
    if rng.random() < 0.4:
        key = rng.choice(list(said))
        wrong, right = tool.arguments[key](rng), slots[key]
        if wrong.value != right.value:
            said[key], afterthought = _corrected(rng, wrong.said, right.said)
    prompt = rng.choice(tool.ways).format(**said)
    call = json.dumps({"tool": name} | {key: slot.value for key, slot in slots.items()})
    return Item(_polite(rng, prompt + afterthought), call, call)


def _corrected(rng: random.Random, wrong: str, right: str) -> tuple[str, str]:
    """What is said in the slot's place, and what is added behind the request."""
    kind, doubt = rng.random(), rng.choice(_SECOND_THOUGHTS)
    if kind < 0.5:
        return f"{wrong}, {doubt} {right}", ""
    return (wrong, f", {doubt} {right}") if kind < 0.8 else (f"{right} and not {wrong}", "")


def _polite(rng: random.Random, request: str) -> str:
    opening = f"{rng.choice(_OPENINGS)} " if rng.random() < 0.5 else ""
    closing = f" {rng.choice(_CLOSINGS)}" if rng.random() < 0.3 else ""
    return opening + request + closing
