"""The task `edit`: an instruction and a short text become the edited text."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from heliostat.tasks.task import Item
from heliostat.tasks.words import ADJECTIVES, NAMES, NOUNS, pick_other, sentence

Words = list[str]


@dataclass(frozen=True, slots=True)
class Edit:
    """What is asked and what it does to the words of the text."""

    asked: str
    apply: Callable[[Words], Words]


_ORDINALS = ("first", "second", "third", "last")
_PLACES = (0, 1, 2, -1)


def _replace(rng: random.Random, words: Words) -> Edit:
    old = rng.choice(words)
    new = pick_other(rng, NOUNS + ADJECTIVES, old)
    asked = rng.choice((f"replace {old} by {new}", f"change {old} to {new}", f"say {new} instead of {old}"))
    return Edit(asked, lambda text: [new if word == old else word for word in text])


def _remove(rng: random.Random, words: Words) -> Edit:
    if rng.random() < 0.5:
        place = rng.randrange(4)
        asked = rng.choice(("drop the {} word", "leave out the {} word", "cut the {} word")).format(
            _ORDINALS[place]
        )
        kept = _PLACES[place]
        return Edit(asked, lambda text: [w for i, w in enumerate(text) if i != kept % len(text)])
    old = rng.choice(words)
    asked = rng.choice((f"remove {old}", f"take out {old}", f"drop the word {old}"))
    return Edit(asked, lambda text: [word for word in text if word != old])


def _swap(rng: random.Random, words: Words) -> Edit:
    one, two = sorted(rng.sample(range(4), 2))
    asked = rng.choice(("swap the {} and the {} word", "exchange the {} and {} words"))

    def apply(text: Words) -> Words:
        result = list(text)
        i, j = _PLACES[one], _PLACES[two]
        result[i], result[j] = text[j], text[i]
        return result

    return Edit(asked.format(_ORDINALS[one], _ORDINALS[two]), apply)


def _turn(rng: random.Random, words: Words) -> Edit:
    asked = rng.choice(
        ("put the words in reverse order", "write it backwards word by word", "turn the word order around")
    )
    return Edit(asked, lambda text: text[::-1])


def _move(rng: random.Random, words: Words) -> Edit:
    if rng.random() < 0.5:
        asked = rng.choice(("move the first word to the end", "put the first word last"))
        return Edit(asked, lambda text: text[1:] + text[:1])
    asked = rng.choice(("move the last word to the front", "start with the last word"))
    return Edit(asked, lambda text: text[-1:] + text[:-1])


def _shout(rng: random.Random, words: Words) -> Edit:
    place = rng.randrange(4)
    asked = rng.choice(("put the {} word in capitals", "make the {} word upper case", "shout the {} word"))
    shouted = _PLACES[place]
    return Edit(
        asked.format(_ORDINALS[place]),
        lambda text: [w.upper() if i == shouted % len(text) else w for i, w in enumerate(text)],
    )


def _insert(rng: random.Random, words: Words) -> Edit:
    spot, new = rng.choice(words), rng.choice(NAMES + ADJECTIVES)
    if rng.random() < 0.5:
        asked = rng.choice((f"insert {new} before {spot}", f"write {new} in front of {spot}"))
        return Edit(asked, lambda text: [piece for w in text for piece in ((new, w) if w == spot else (w,))])
    asked = rng.choice((f"insert {new} after {spot}", f"write {new} right behind {spot}"))
    return Edit(asked, lambda text: [piece for w in text for piece in ((w, new) if w == spot else (w,))])


def _double(rng: random.Random, words: Words) -> Edit:
    place = rng.randrange(4)
    asked = rng.choice(("say the {} word twice", "double the {} word")).format(_ORDINALS[place])
    doubled = _PLACES[place]
    return Edit(
        asked, lambda text: [p for i, w in enumerate(text) for p in [w] * (1 + (i == doubled % len(text)))]
    )


_EDITS = (_replace, _remove, _swap, _turn, _move, _shout, _insert, _double)
_FRAMES = ("{asked}: {text}", "{asked} in this text: {text}", "please {asked}: {text}", 'in "{text}" {asked}')


def generate(rng: random.Random) -> Item:
    """One or two edits of one sentence; the sentence is the fact, so no test sentence is seen in training."""
    words = sentence(rng, rng.randrange(4, 8))
    first = rng.choice(_EDITS)(rng, words)
    edits = [first]
    if rng.random() < 0.3:
        # The second edit is chosen for, and applied to, what the first one leaves.
        edits.append(rng.choice(_EDITS)(rng, first.apply(words)))
    asked, result = " and then ".join(edit.asked for edit in edits), words
    for edit in edits:
        result = edit.apply(result)
    prompt = rng.choice(_FRAMES).format(asked=asked, text=" ".join(words))
    return Item(prompt, " ".join(result), " ".join(words))
