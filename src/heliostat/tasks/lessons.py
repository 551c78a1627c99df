"""How the corpus lays out a lesson: pairs of input and output that share a convention, told or shown."""

import random
from collections.abc import Sequence
from typing import Any

Document = dict[str, Any]
"""{"text": ...}, or {"messages": [{"role", "content"}, ...]}."""
Pair = tuple[str, str]

# In characters. Most documents are about as long as a task's prompt and answer, 100 tokens and some; a few
# are as long as the training window of 256 tokens, so that all positions are learned.
_ROOM, _LARGE_ROOM, _LARGE = 300, 540, 0.2

_LABELS = (
    ("in: ", "\nout: ", "\n"),
    ("q: ", "\na: ", "\n"),
    ("", " -> ", "\n"),
    ("", " => ", "\n"),
    ("", "\n", "\n\n"),
    ("* ", ": ", "\n"),
    ("given ", " we get ", ". "),
    ("text: ", "\nresult: ", "\n\n"),
    ("", " | ", "\n"),
    ("<", "> becomes <", ">\n"),
)


def text(content: str) -> Document:
    return {"text": content}


def chat(*turns: str, system: str = "") -> Document:
    """A conversation whose turns alternate from the user; the last one is the assistant's."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return {"messages": messages}


def fitting(pairs: Sequence[Pair], room: int) -> list[Pair]:
    """The first pairs that fit the room together, at least one."""
    kept: list[Pair] = []
    used = 0
    for given, wanted in pairs:
        used += len(given) + len(wanted) + 8
        if kept and used > room:
            break
        kept.append((given, wanted))
    return kept


def lesson(rng: random.Random, pairs: Sequence[Pair], told: str = "") -> Document:
    """The pairs as one document: a list, examples, or a conversation.

    `told` says the convention in words; where it is absent the reader must infer it from the earlier pairs.
    """
    pairs = fitting(pairs, (_LARGE_ROOM if rng.random() < _LARGE else _ROOM) - len(told))
    layout = rng.random()
    if layout < 0.35:
        before, between, after = rng.choice(_LABELS)
        head = f"{told}\n" if told else ""
        return text(
            head + "".join(f"{before}{given}{between}{wanted}{after}" for given, wanted in pairs).rstrip()
        )
    if layout < 0.6 and told:
        pairs = pairs[: rng.choice((1, 1, 2, 3))]
        joint = rng.choice((": ", "\n", " - ", ". "))
        turns = [part for given, wanted in pairs for part in (f"{told}{joint}{given}", wanted)]
        return chat(*turns)
    pairs = pairs[: rng.choice((1, 2, 3, 4, 9))] if told else pairs
    return chat(*[part for pair in pairs for part in pair], system=told)
