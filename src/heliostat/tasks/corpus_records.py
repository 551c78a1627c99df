"""Lessons about records: facts and requests become JSON, under schemas and names that the context gives."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from heliostat.tasks.corpus_numbers import small_number
from heliostat.tasks.lessons import Document, Pair, chat, lesson, text
from heliostat.tasks.words import (
    ADJECTIVES,
    CHORES,
    CITIES,
    DAYS,
    GROCERIES,
    MUSIC,
    NAMES,
    NOTES,
    NOUNS,
    ROOMS,
    THINGS,
    VERBS,
    clock,
    listed,
    number_words,
    pick_other,
    random_time,
    spoken_time,
)

_KEYS = listed(
    "name who person friend user owner room place where zone city town day date when at time start hour item "
    "thing object what task job note text body title label kind type style color size count number amount "
    "total level value percent degrees celsius volume minutes length for with to from id key state genre"
)
_FUNCTION_VERBS = listed("set get add make send show start find")
_FUNCTION_NOUNS = listed("lamp clock list mail song note heat day task plan room trip")
_FUNCTIONS = tuple(
    f"{verb}{joint}{noun}" for verb in _FUNCTION_VERBS for joint in ("_", ".", "") for noun in _FUNCTION_NOUNS
)


@dataclass(frozen=True, slots=True)
class Fact:
    """A value as JSON and the words that say it."""

    value: str | int
    said: str


Draw = Callable[[random.Random], Fact]


def _time_fact(rng: random.Random) -> Fact:
    hour, minute = random_time(rng)
    return Fact(clock(hour, minute), spoken_time(rng, hour, minute))


def _day_fact(rng: random.Random) -> Fact:
    i, step = rng.randrange(7), rng.choice((-1, 0, 0, 0, 1))
    said = {-1: f"the day before {DAYS[i]}", 0: DAYS[i], 1: f"the day after {DAYS[i]}"}[step]
    return Fact(DAYS[(i + step) % 7], said)


def _number_fact(rng: random.Random) -> Fact:
    number = small_number(rng)
    return Fact(number, number_words(number) if rng.random() < 0.7 else str(number))


def _minutes_fact(rng: random.Random) -> Fact:
    named = {
        30: "half an hour",
        45: "three quarters of an hour",
        60: "an hour",
        90: "an hour and a half",
        120: "two hours",
    }
    minutes = rng.choice((*named, *range(2, 60, 3)))
    return Fact(minutes, named.get(minutes, f"{number_words(minutes)} minutes"))


def _share_fact(rng: random.Random) -> Fact:
    named = {25: "a quarter", 50: "half", 75: "three quarters", 100: "all"}
    share = rng.choice((*named, *range(5, 100, 5)))
    return Fact(
        share, named[share] if share in named and rng.random() < 0.5 else f"{number_words(share)} percent"
    )


def _word_fact(words: tuple[str, ...]) -> Draw:
    return lambda rng: Fact(word := rng.choice(words), word)


_name, _room, _city = _word_fact(NAMES), _word_fact(ROOMS), _word_fact(CITIES)
_item, _genre, _chore, _note = _word_fact(GROCERIES), _word_fact(MUSIC), _word_fact(CHORES), _word_fact(NOTES)
_thing, _adjective = _word_fact(THINGS + NOUNS), _word_fact(ADJECTIVES)
_ANY: tuple[Draw, ...] = (
    _name,
    _room,
    _day_fact,
    _city,
    _item,
    _thing,
    _adjective,
    _chore,
    _note,
    _number_fact,
    _number_fact,
    _time_fact,
)
_ANY += (_minutes_fact, _share_fact, _genre)

# Requests in wordings of their own: {0}, {1}, ... are the facts in the order of the draws.
_REQUESTS: tuple[tuple[tuple[Draw, ...], tuple[str, ...]], ...] = (
    ((_time_fact, _day_fact), ("i get up at {0} on {1}", "{1} {0} ring the bell", "call me at {0} {1}")),
    ((_minutes_fact, _item), ("cook the {1} for {0}", "{0} for the {1} from now", "leave the {1} for {0}")),
    (
        (_room, _share_fact),
        ("more light in the {0}, {1} of it", "turn the {0} lamps to {1}", "{0} lights at {1} now"),
    ),
    (
        (_room, _number_fact),
        ("warm the {0} up to {1}", "the {0} is cold, go to {1} degrees", "{1} degrees for the {0}"),
    ),
    ((_chore, _time_fact), ("think of this: {0} at {1}", "at {1} {0}", "my job for {1} is to {0}")),
    ((_name, _note), ("say to {0}: {1}", "a note for {0}: {1}", "{0} should hear this: {1}")),
    (
        (_genre, _room, _share_fact),
        ("some {0} for the {1}, {2} loud", "{1}: {0}, sound at {2}", "start the {0} in the {1}, {2}"),
    ),
    ((_number_fact, _item), ("get {0} {1}", "the shop list needs {0} {1}", "{0} {1} more on my list")),
    (
        (_name, _day_fact, _time_fact),
        ("see {0} {1} at {2}", "lunch with {0} at {2} on {1}", "{0} comes at {2} {1}"),
    ),
    (
        (_city, _day_fact),
        ("rain or sun in {0} {1}?", "tell me the sky of {0} for {1}", "{1} in {0}: is it warm?"),
    ),
    ((_name, _number_fact, _thing), ("give {0} {1} {2}", "{0} wants {1} {2}", "bring {1} {2} to {0}")),
    (
        (_thing, _adjective, _room),
        ("a {1} {0} stands in the {2}", "look for the {1} {0} in the {2}", "the {2} has a {1} {0}"),
    ),
)

_FIXES = ("no, {}", "i mean {}", "wait, {}", "sorry, {}", "rather {}", "not that, {}")


def _request(rng: random.Random, draws: tuple[Draw, ...], ways: tuple[str, ...]) -> tuple[str, list[Any]]:
    """A request and its values in the order of the draws; sometimes the speaker corrects a value."""
    facts = [draw(rng) for draw in draws]
    spoken = [fact.said for fact in facts]
    if rng.random() < 0.3:
        place = rng.randrange(len(facts))
        wrong = draws[place](rng)
        if wrong.value != facts[place].value:
            spoken[place] = f"{wrong.said}, {rng.choice(_FIXES).format(spoken[place])}"
    opening = rng.choice(("", "", "hi, ", "well, ", "now ", "can you help: ", "please, "))
    return opening + rng.choice(ways).format(*spoken), [fact.value for fact in facts]


def _shape(rng: random.Random, name: str, keys: list[str]) -> Callable[[list[Any]], str]:
    """One way to write a call of `name` with those keys."""
    head = rng.choice(("call", "name", "function", "action", "do", "op", "cmd", "fn", "use"))
    body = rng.choice(("args", "with", "in", "data", "values"))
    shapes: tuple[Callable[[list[Any]], str], ...] = (
        lambda values: json.dumps({head: name} | dict(zip(keys, values, strict=True))),
        lambda values: json.dumps({head: name} | dict(zip(keys, values, strict=True))),
        lambda values: json.dumps(dict(zip(keys, values, strict=True)) | {head: name}),
        lambda values: json.dumps({head: name, body: dict(zip(keys, values, strict=True))}),
        lambda values: json.dumps({name: dict(zip(keys, values, strict=True))}),
        lambda values: json.dumps([name, *values]),
        lambda values: json.dumps(dict(zip(keys, values, strict=True))),
        lambda values: (
            name + "(" + ", ".join(f"{k}={json.dumps(v)}" for k, v in zip(keys, values, strict=True)) + ")"
        ),
        lambda values: f"{name}: " + ", ".join(f"{k} {v}" for k, v in zip(keys, values, strict=True)),
    )
    return rng.choice(shapes)


def requests_shown(rng: random.Random) -> Document:
    """Several requests of one kind and their calls: the convention is in the examples only."""
    draws, ways = rng.choice(_REQUESTS)
    shape = _shape(rng, rng.choice(_FUNCTIONS), rng.sample(_KEYS, len(draws)))
    pairs: list[Pair] = []
    for _ in range(5):
        said, values = _request(rng, draws, ways)
        pairs.append((said, shape(values)))
    return lesson(rng, pairs)


def requests_told(rng: random.Random) -> Document:
    """A request whose call is described first: one or two signatures, of which the right one is used."""
    draws, ways = rng.choice(_REQUESTS)
    name, keys = rng.choice(_FUNCTIONS), rng.sample(_KEYS, len(draws))
    said, values = _request(rng, draws, ways)
    call = json.dumps({"call": name} | dict(zip(keys, values, strict=True)))
    shown = rng.choice(
        (f"{name}({', '.join(keys)})", json.dumps({"call": name} | dict.fromkeys(keys, "...")))
    )
    head = rng.choice(("use", "write", "answer with", "format", "as json"))
    if rng.random() < 0.5:
        return chat(f"{said}\n{head} {shown}", call)
    return chat(said, call, system=f"{head} {shown}")


def records_listed(rng: random.Random) -> Document:
    """Facts under random keys become JSON; numbers and times said in words become values."""
    keys = rng.sample(_KEYS, rng.randrange(2, 5))
    draws = [rng.choice(_ANY) for _ in keys]
    tie, joint = rng.choice((" is ", ": ", " = ", " ")), rng.choice((", ", "; ", " and ", "\n"))
    pairs = []
    for _ in range(4):
        facts = [draw(rng) for draw in draws]
        given = list(zip(keys, facts, strict=True))
        if rng.random() < 0.3:
            rng.shuffle(given)
        record = {key: fact.value for key, fact in zip(keys, facts, strict=True)}
        pairs.append((joint.join(f"{key}{tie}{fact.said}" for key, fact in given), json.dumps(record)))
    return lesson(rng, pairs, rng.choice(("", "make a record", f"json with {', '.join(keys)}", "as json")))


def _record(rng: random.Random, keys: int) -> dict[str, Any]:
    return {key: rng.choice(_ANY)(rng).value for key in rng.sample(_KEYS, keys)}


def record_asked(rng: random.Random) -> Document:
    """A record in context, then questions about its fields, or about which field has a value."""
    record = _record(rng, rng.randrange(3, 6))
    keys = rng.sample(sorted(record), rng.randrange(1, 4))
    asked = rng.choice(("{}?", "what is {}?", "give {}", "read {}"))
    if rng.random() < 0.3:
        return lesson(rng, [(f"which key has {record[key]}?", key) for key in keys], json.dumps(record))
    return lesson(rng, [(asked.format(key), str(record[key])) for key in keys], json.dumps(record))


def record_changed(rng: random.Random) -> Document:
    """A record and a wish become the record with one field set, removed or renamed."""
    pairs = []
    verbs = rng.choice(
        (("set {} to {}", "drop {}", "rename {} to {}"), ("{} := {}", "without {}", "{} -> {}"))
    )
    for _ in range(2):
        record = _record(rng, rng.randrange(2, 4))
        key, kind = rng.choice(sorted(record)), rng.randrange(3)
        if kind == 0:
            value = rng.choice(_ANY)(rng).value
            wish, changed = verbs[0].format(key, value), record | {key: value}
        elif kind == 1:
            wish, changed = verbs[1].format(key), {k: v for k, v in record.items() if k != key}
        else:
            fresh = pick_other(rng, [k for k in _KEYS if k not in record], key)
            wish, changed = (
                verbs[2].format(key, fresh),
                {fresh if k == key else k: v for k, v in record.items()},
            )
        pairs.append((f"{json.dumps(record)} {wish}", json.dumps(changed)))
    return lesson(rng, pairs)


def record_told(rng: random.Random) -> Document:
    """JSON becomes a line of words: the other direction."""
    keys = rng.sample(_KEYS, rng.randrange(2, 4))
    draws = [rng.choice(_ANY) for _ in keys]
    tie, joint = rng.choice((" is ", ": ", " = ")), rng.choice((", ", "; ", " and "))
    pairs = []
    for _ in range(3):
        record = {key: draw(rng).value for key, draw in zip(keys, draws, strict=True)}
        pairs.append((json.dumps(record), joint.join(f"{key}{tie}{value}" for key, value in record.items())))
    return lesson(rng, pairs, rng.choice(("", "say it in words")))


def records_alone(rng: random.Random) -> Document:
    """Lines of JSON of one schema, with nothing around them."""
    keys = rng.sample(_KEYS, rng.randrange(2, 4))
    draws = [rng.choice(_ANY) for _ in keys]
    lines = [
        json.dumps({k: d(rng).value for k, d in zip(keys, draws, strict=True)})
        for _ in range(rng.randrange(2, 6))
    ]
    return text("\n".join(lines))


def echoes(rng: random.Random) -> Document:
    """A record or a sentence of facts is said back unchanged."""
    told = rng.choice(("repeat", "copy this", "say it again", "echo", "write exactly"))
    given = json.dumps(_record(rng, rng.randrange(2, 5)))
    if rng.random() < 0.3:
        given = (
            f"{rng.choice(NAMES)} {rng.choice(VERBS)} {number_words(small_number(rng))} {rng.choice(THINGS)}"
        )
    return lesson(rng, [(given, given)], told)
