"""The ids behind answers, for when they return as text in a conversation: then their pages are found. No torch.

A text has many spellings in tokens and a model need not choose the tokenizer's. Whoever sends an answer back as
text would get another prompt than the one that was said, and pages of it would be of no use.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from heliostat.errors import Refused
from heliostat.model.tokenizer import Tokenizer

Render = Callable[[Sequence[Mapping[str, Any]]], str]


@dataclass(slots=True)
class Recalls:
    """What came of assistant messages in conversations."""

    looked_up: int = 0
    spliced: int = 0
    """Of these, put in with the ids that were said."""
    differing: int = 0
    """Of these, not as the tokenizer spells them: without memory their pages had been lost."""
    unfit: int = 0
    """Remembered, but the chat template does not write them as they are: spelled by the tokenizer."""


class Remembered:
    """Ids of the latest answers by (salt, text), ``limit`` tokens of them, the longest unused forgotten first.

    Thread-safe: templates may be rendered beside the engine.
    """

    def __init__(self, *, limit: int = 2**18) -> None:
        self.recalls = Recalls()
        self._limit = limit
        self._tokens = 0
        self._lock = threading.Lock()
        self._ids: OrderedDict[tuple[str, str], tuple[int, ...]] = OrderedDict()

    @property
    def tokens(self) -> int:
        """How many are remembered."""
        return self._tokens

    def remember(self, tokenizer: Tokenizer, text: str, ids: Sequence[int], *, salt: str = "") -> None:
        """Keep what was said, the end token left out; nothing where the ids say more than the text, or something else.

        Text cut by a stop string is such a case: its last token says more.
        """
        said = tuple(ids[:-1] if ids and ids[-1] in tokenizer.eos_ids else ids)
        if not text or len(said) > self._limit or tokenizer.decode(said, skip_special=False) != text:
            return
        with self._lock:
            self._tokens += len(said) - len(self._ids.pop((salt, text), ()))
            self._ids[salt, text] = said
            while self._tokens > self._limit:
                self._tokens -= len(self._ids.popitem(last=False)[1])

    def prompt_ids(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        salt: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Ids of the conversation as the template writes it; answers remembered under ``salt`` stand with their own.

        The text is always that of the plain ``tokenizer.render(messages, tools=tools)``.
        """
        render = partial(tokenizer.render, tools=tools)
        plain = render(messages)
        ids = tokenizer.encode(plain)
        asked = _answers(messages)
        known = self._known(asked, salt)
        places = _places(render, messages, plain, list(known)) if known else {}
        spliced = _spliced(tokenizer, plain, [(places[n], messages[n]["content"], known[n]) for n in places])
        if tokenizer.decode(spliced, skip_special=False) != tokenizer.decode(ids, skip_special=False):
            places, spliced = {}, ids
        spelled = ((tokenizer.encode_on(messages[n]["content"]), known[n]) for n in places)
        differing = sum(tuple(usual) != said for usual, said in spelled)
        with self._lock:
            self.recalls.looked_up += len(asked)
            self.recalls.spliced += len(places)
            self.recalls.unfit += len(known) - len(places)
            self.recalls.differing += differing
        return spliced if places else ids

    def _known(self, answers: Mapping[int, str], salt: str) -> dict[int, tuple[int, ...]]:
        """Ids of those that are remembered."""
        with self._lock:
            found = {
                number: said for number, text in answers.items() if (said := self._ids.get((salt, text)))
            }
            for number in found:
                self._ids.move_to_end((salt, answers[number]))
        return found


def _answers(messages: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Texts of the assistant's messages, by number; those made of parts are not looked up."""
    turns = ((number, message.get("role"), message.get("content")) for number, message in enumerate(messages))
    return {number: text for number, role, text in turns if role == "assistant" and isinstance(text, str)}


def _places(
    render: Render, messages: Sequence[Mapping[str, Any]], plain: str, numbers: Sequence[int]
) -> dict[int, int]:
    """Where the contents of these messages begin in ``plain``, by number; those missing are not written as they are."""
    found = _written(render, messages, plain, numbers)
    if found is not None:
        return found
    alone = [_written(render, messages, plain, [number]) or {} for number in numbers]
    return {number: place for one in alone for number, place in one.items()}


def _written(
    render: Render, messages: Sequence[Mapping[str, Any]], plain: str, numbers: Sequence[int]
) -> dict[int, int] | None:
    """The same, or None unless every one stands in ``plain`` once and whole.

    Short answers stand in many places: so marks are written instead of them, and then put back.
    """
    mark = "Q"
    while mark in plain:
        mark += "Q"
    marks = {number: f"{mark}{number}X" for number in numbers}
    marked_turns = [{**m, "content": marks[n]} if n in marks else m for n, m in enumerate(messages)]
    try:
        text = render(marked_turns)
    except Refused:
        return None
    if any(text.count(one) != 1 for one in marks.values()):
        return None
    places = {}
    for number in sorted(numbers, key=lambda n: text.index(marks[n])):
        places[number] = text.index(marks[number])
        text = text.replace(marks[number], messages[number]["content"])
    return places if text == plain else None


def _spliced(
    tokenizer: Tokenizer, plain: str, answers: Sequence[tuple[int, str, Sequence[int]]]
) -> list[int]:
    """Ids of ``plain``, with those given where the answers (where, text, ids) stand."""
    ids: list[int] = []
    at = 0
    for start, text, said in sorted(answers):
        ids += _piece(tokenizer, plain, at, start)
        ids += said
        at = start + len(text)
    return ids + _piece(tokenizer, plain, at, len(plain))


def _piece(tokenizer: Tokenizer, plain: str, start: int, stop: int) -> list[int]:
    if start == stop:
        return []
    return tokenizer.encode_on(plain[start:stop]) if start else tokenizer.encode(plain[:stop])
