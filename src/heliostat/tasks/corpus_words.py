"""Lessons about words: copying, order, places, capitals, replacement, questions about a text, plain prose."""

import random
from collections.abc import Callable

from heliostat.tasks.corpus_numbers import small_number
from heliostat.tasks.lessons import Document, Pair, chat, lesson, text
from heliostat.tasks.words import (
    ADJECTIVES,
    ADVERBS,
    NAMES,
    NOUNS,
    ROOMS,
    THINGS,
    VERBS,
    number_words,
    pick_other,
    sentence,
)

Words = list[str]
_ALL = NAMES + THINGS + ADJECTIVES + NOUNS + VERBS + ADVERBS
_PLACES = {
    0: ("first", "1st", "word 1"),
    1: ("second", "2nd", "word 2"),
    2: ("third", "3rd", "word 3"),
    -1: ("last", "final"),
}


def _some_words(rng: random.Random, fewest: int = 3, most: int = 8) -> Words:
    """A sentence or a loose list of words."""
    if rng.random() < 0.6:
        return sentence(rng, rng.randrange(max(fewest, 4), most + 1))
    return rng.sample(_ALL, rng.randrange(fewest, most + 1))


Change = tuple[str, Callable[[Words], Words]]


def _change(rng: random.Random, words: Words) -> Change:
    """A rewriting and its name: the names are terse and not those of everyday instructions."""
    place = rng.choice(list(_PLACES))
    spot, new, old = rng.choice(_PLACES[place]), rng.choice(_ALL), rng.choice(words)
    other = rng.choice([p for p in _PLACES if p != place])

    def at(text: Words, i: int) -> int:
        return i % len(text)

    def exchanged(text: Words) -> Words:
        result = list(text)
        result[at(text, place)], result[at(text, other)] = text[at(text, other)], text[at(text, place)]
        return result

    return rng.choice(
        (
            (rng.choice(("reversed", "backward", "from end to start")), lambda t: t[::-1]),
            (f"without {old}", lambda t: [w for w in t if w != old]),
            (f"no {spot}", lambda t: [w for i, w in enumerate(t) if i != at(t, place)]),
            (
                rng.choice((f"{old} -> {new}", f"{new} for {old}", f"{old} becomes {new}")),
                lambda t: [new if w == old else w for w in t],
            ),
            (f"{spot} <-> {_PLACES[other][0]}", exchanged),
            (rng.choice(("rotated", "rotate left")), lambda t: t[1:] + t[:1]),
            ("rotate right", lambda t: t[-1:] + t[:-1]),
            (f"{spot} big", lambda t: [w.upper() if i == at(t, place) else w for i, w in enumerate(t)]),
            (f"{old} big", lambda t: [w.upper() if w == old else w for w in t]),
            (f"+{new} after {old}", lambda t: [p for w in t for p in ((w, new) if w == old else (w,))]),
            (f"+{new} before {old}", lambda t: [p for w in t for p in ((new, w) if w == old else (w,))]),
            (f"{spot} x 2", lambda t: [p for i, w in enumerate(t) for p in [w] * (1 + (i == at(t, place)))]),
            (rng.choice(("+" + new, f"then {new}")), lambda t: [*t, new]),
            ("first three", lambda t: t[:3]),
            ("all twice", lambda t: t + t),
        )
    )


def rewritings_told(rng: random.Random) -> Document:
    """Each pair names its own change, sometimes two in a row."""
    order = rng.choice(
        (
            "[{op}] {text}",
            "{text} [{op}]",
            "{op}: {text}",
            "{text} / {op}",
            "op {op}\n{text}",
            "{op} | {text}",
        )
    )
    pairs: list[Pair] = []
    for _ in range(6):
        words = _some_words(rng)
        name, apply = _change(rng, words)
        result = apply(words)
        if result and rng.random() < 0.3:
            second, again = _change(rng, result)
            name, result = f"{name} & {second}", again(result)
        pairs.append((order.format(op=name, text=" ".join(words)), " ".join(result)))
    return lesson(rng, pairs[: rng.randrange(1, 7)])


def rewritings_shown(rng: random.Random) -> Document:
    """One change without a name, to be inferred from the examples."""
    seed = rng.getrandbits(32)
    pairs: list[Pair] = []
    for _ in range(6):
        words = rng.sample(_ALL, rng.randrange(3, 7))
        _, apply = _change(random.Random(seed), words)
        pairs.append((" ".join(words), " ".join(apply(words))))
    return lesson(rng, pairs)


def steps_shown(rng: random.Random) -> Document:
    """A text and the texts that a row of changes makes of it, one after another."""
    words = _some_words(rng, 4)
    lines = [" ".join(words)]
    for _ in range(rng.randrange(2, 6)):
        name, apply = _change(rng, words)
        words = apply(words)[:10] or ["empty"]
        lines.append(f"{name}: {' '.join(words)}")
    return text(rng.choice(("\n", " ; ", "\n- ")).join(lines))


def places_asked(rng: random.Random) -> Document:
    """Which word stands where in a text, and what stands beside a word."""
    words = list(dict.fromkeys(_some_words(rng, 4)))
    pairs: list[Pair] = []
    for _ in range(rng.randrange(1, 5)):
        place = rng.choice((0, 1, 2, -1))
        i = rng.randrange(len(words) - 1)
        asked = rng.choice(_PLACES[place])
        pairs.append(
            rng.choice(
                (
                    (f"{asked}?", words[place]),
                    (f"after {words[i]}?", words[i + 1]),
                    (f"before {words[i + 1]}?", words[i]),
                    ("how many words?", str(len(words))),
                )
            )
        )
    return lesson(rng, pairs, " ".join(words))


def capitals(rng: random.Random) -> Document:
    pairs = [(word, word.upper()) for word in rng.sample(_ALL, rng.randrange(4, 10))]
    if rng.random() < 0.25:
        return lesson(rng, [(big, small) for small, big in pairs])
    return lesson(rng, pairs, rng.choice(("", "big letters", "capitals")))


def copies(rng: random.Random) -> Document:
    """A text comes twice, sometimes with something between."""
    given = " ".join(_some_words(rng, 4, 8))
    if rng.random() < 0.3:
        given = "".join(
            rng.choice("abcdefghijklmnopqrstuvwxyz 0123456789") for _ in range(rng.randrange(8, 30))
        ).strip()
    if rng.random() < 0.4:
        return chat(f"{rng.choice(('repeat', 'again', 'copy', 'say'))}: {given}", given)
    between = rng.choice(("\n", " = ", " | ", "\nagain: ", " and once more "))
    return text(between.join([given] * rng.randrange(2, 4)))


def recalled(rng: random.Random) -> Document:
    """A row of names and things, then look-ups."""
    names = rng.sample(NAMES + NOUNS, rng.randrange(3, 7))
    values = [rng.choice((rng.choice(_ALL), str(small_number(rng)))) for _ in names]
    tie = rng.choice((": ", " = ", " has ", " -> ", " is "))
    head = rng.choice((", ", "; ", "\n", ". ")).join(
        f"{n}{tie}{v}" for n, v in zip(names, values, strict=True)
    )
    asked = rng.sample(range(len(names)), rng.randrange(1, 4))
    return lesson(rng, [(f"{names[i]}?", values[i]) for i in asked], head)


def facts_asked(rng: random.Random) -> Document:
    """A few sentences about people, places and things, then questions."""
    people = rng.sample(NAMES, 3)
    facts: list[tuple[str, str, str]] = []
    for person in people:
        room, thing, number, adjective = (
            rng.choice(ROOMS),
            rng.choice(THINGS),
            small_number(rng),
            rng.choice(ADJECTIVES),
        )
        facts.append(
            rng.choice(
                (
                    (f"{person} is in the {room}", f"where is {person}?", f"in the {room}"),
                    (
                        f"{person} has {number_words(number)} {thing}",
                        f"how many {thing} does {person} have?",
                        str(number),
                    ),
                    (
                        f"the {thing} of {person} are {adjective}",
                        f"how are the {thing} of {person}?",
                        adjective,
                    ),
                    (
                        f"{person} {rng.choice(VERBS)} the {adjective} {thing}",
                        f"whose {thing} are {adjective}?",
                        person,
                    ),
                )
            )
        )
    asked = rng.sample(facts, rng.randrange(1, 4))
    return lesson(
        rng, [(question, answer) for _, question, answer in asked], ". ".join(f[0] for f in facts) + "."
    )


def prose(rng: random.Random) -> Document:
    """Plain sentences; a cast of few words comes back, so that context pays."""
    cast = rng.sample(NOUNS, 3)
    lines = []
    for _ in range(rng.randrange(3, 7)):
        words = sentence(rng, rng.randrange(4, 9))
        lines.append(
            " ".join(rng.choice(cast) if word in NOUNS and rng.random() < 0.6 else word for word in words)
        )
    return text(". ".join(lines) + ".")


_SMALL_TALK = (
    (("hello", "hi", "hey", "good morning"), ("hello! how can i help?", "hi there.", "good day to you.")),
    (("thanks", "thank you", "thank you so much"), ("you are welcome.", "any time.", "gladly.")),
    (("who are you?", "what are you?"), ("i am a small model.", "a very small language model.")),
    (("bye", "good night", "see you soon"), ("good bye!", "see you.", "until next time.")),
    (("how are you?", "are you well?"), ("i am well, thank you.", "very well, and you?")),
)


def small_talk(rng: random.Random) -> Document:
    turns: list[str] = []
    for asked, answers in rng.sample(_SMALL_TALK, rng.randrange(1, 4)):
        turns += [rng.choice(asked), rng.choice(answers)]
    return chat(*turns)


def choices(rng: random.Random) -> Document:
    """Is it in the text? yes or no; or the one of two words that is."""
    words = _some_words(rng, 4)
    inside, outside = rng.choice(words), pick_other(rng, _ALL, words[0])
    while outside in words:
        outside = rng.choice(_ALL)
    two = [inside, outside]
    rng.shuffle(two)
    pairs = [
        (f"is {inside} in it?", "yes"),
        (f"is {outside} in it?", "no"),
        (f"{two[0]} or {two[1]}?", inside),
    ]
    rng.shuffle(pairs)
    return lesson(rng, pairs[: rng.randrange(1, 4)], " ".join(words))
