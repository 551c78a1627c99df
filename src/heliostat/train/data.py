"""Records to examples: the exact token ids that serving will use, where answers lie in them, and batches.

Serving renders a conversation and tokenizes it anew for every turn, so training does too: an answer is
learned behind the very ids a server would have put before it. Knows no tensors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from heliostat.errors import Refused
from heliostat.model.tokenizer import Tokenizer
from heliostat.train.formats import BadLine, Record, Records, Turn, scan

T = TypeVar("T")

# Batches' worth of examples that are sorted by length together: long enough for little padding, short enough
# that the order of an epoch stays mostly chance.
_SORTED_TOGETHER = 50


class TooLong(Refused):
    """An example that does not fit; answers are never cut to make it fit."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and the answers in them. The ids end where the last answer ends."""

    ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    """[start, stop) of each answer, in order; 1 <= start < stop. ids[stop - 1] is the answer's end token."""


@dataclass(frozen=True, slots=True)
class Examples:
    """What a file gave to learn from, and what of it was left out."""

    path: Path
    format: str
    examples: tuple[Example, ...]
    bad: tuple[BadLine, ...] = ()
    """Lines left out because ``skip_bad`` allowed it."""
    too_long: tuple[BadLine, ...] = ()
    """Lines left out because ``too_long="skip"`` allowed it."""

    @property
    def answer_tokens(self) -> int:
        """Tokens that carry loss in one epoch."""
        return sum(stop - start for example in self.examples for start, stop in example.answers)


def read_examples(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    skip_bad: bool = False,
    too_long: Literal["refuse", "skip"] = "refuse",
) -> Examples:
    """All examples of a jsonl file.

    Everything that is wrong with any line, in its form or once it is tokenized, is found before this returns
    and is refused in one message with line numbers, unless ``skip_bad``. Records longer than ``max_length``
    tokens are bad lines too, or are left out and counted with ``too_long="skip"``.
    """
    found = scan(path)
    sifted = sift(
        found,
        lambda record: encode(record, tokenizer, max_length=max_length),
        what="record",
        skip_bad=skip_bad,
        too_long=too_long,
    )
    examples = tuple(example for made in sifted.made for example in made)
    return Examples(found.path, found.format, examples, sifted.bad, sifted.too_long)


@dataclass(frozen=True, slots=True)
class Sifted(Generic[T]):
    """What was made of the good records of a file, and the lines of the others."""

    made: tuple[T, ...]
    bad: tuple[BadLine, ...]
    too_long: tuple[BadLine, ...]


def sift(
    found: Records,
    make: Callable[[Record], T],
    *,
    what: str,
    skip_bad: bool,
    too_long: Literal["refuse", "skip"],
) -> Sifted[T]:
    """``make`` of every record; all that it refuses is refused in one message with line numbers, or left out.

    ``what`` the records are called where every one is too long.
    """
    made: list[T] = []
    used: list[Record] = []
    bad, long = list(found.bad), list[BadLine]()
    for record in found.records:
        try:
            made.append(make(record))
            used.append(record)
        except TooLong as reason:
            (long if too_long == "skip" else bad).append(BadLine(record.line, str(reason)))
        except Refused as reason:
            bad.append(BadLine(record.line, str(reason)))
    if long and not used and not bad:
        raise Refused(f"{found.path}: every {what} is too long, the first: {long[0].reason}")
    bad.sort(key=lambda line: line.line)
    Records(found.path, found.format, tuple(used), tuple(bad)).checked(skip_bad=skip_bad)
    return Sifted(tuple(made), tuple(bad), tuple(long))


def encode(record: Record, tokenizer: Tokenizer, *, max_length: int) -> list[Example]:
    """The examples of one record, mostly one. Refused (TooLong) if one has more than ``max_length`` tokens.

    A text is one answer from its second token on. A conversation is one example with several answers as long
    as each prompt begins with exactly the ids of the prompt and the answer before it. Where it does not,
    because the template rewrites earlier turns or tokenizes them in another way once they are history, the
    turns become examples of their own: a server would not have those ids either.
    """
    if record.text is not None:
        ids = document_ids(record, tokenizer)
        examples = [Example(tuple(ids), ((1, len(ids)),))]
    elif record.plain and not tokenizer.has_template:
        asked, answered = record.turns
        prompt = tokenizer.plain_prompt_ids(asked.content)
        examples = [answered_by(prompt, tokenizer.plain_answer_ids(asked.content, answered.content))]
    else:
        examples = list(_merged(_asked_and_answered(record.turns, tokenizer)))
    for example in examples:
        _check_length(len(example.ids), max_length)
    return examples


def answered_by(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """The example of one prompt and one answer, in token ids; refused where either has none."""
    if not prompt or not answer:
        raise Refused(f"the {'prompt' if not prompt else 'answer'} has no tokens")
    return Example((*prompt, *answer), ((len(prompt), len(prompt) + len(answer)),))


def question_ids(record: Record, tokenizer: Tokenizer, *, max_length: int) -> list[int]:
    """The ids that serving gives a model before a record's last answer. TooLong if they do not fit."""
    asked = record.question
    if record.plain and not tokenizer.has_template:
        ids = tokenizer.plain_prompt_ids(asked[0].content)
    else:
        ids = tokenizer.prompt_ids(_messages(asked))
    if not ids:
        raise Refused("the prompt has no tokens")
    _check_length(len(ids), max_length)
    return ids


def document_ids(record: Record, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text record, of any length, closed by the end token where the tokenizer has one."""
    if record.text is None:
        raise Refused("a conversation is no plain text: this needs records {'text': ...}")
    ids = [*tokenizer.plain_prompt_ids(record.text), *tokenizer.eos_ids[:1]]
    if len(ids) < 2:
        raise Refused("the text has fewer than two tokens, so there is no next token to learn")
    return ids


def _asked_and_answered(turns: Sequence[Turn], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of every answer to learn."""
    for place, turn in enumerate(turns):
        if turn.role == "assistant" and turn.learned:
            yield tokenizer.turn_ids(_messages(turns[: place + 1]))


def _merged(turns: Iterable[tuple[list[int], list[int]]]) -> Iterator[Example]:
    """Turns that go on from the very ids of the turn before, as one example."""
    so_far: Example | None = None
    for prompt, answer in turns:
        example = answered_by(prompt, answer)
        if so_far is not None and tuple(prompt[: len(so_far.ids)]) == so_far.ids:
            example = Example(example.ids, so_far.answers + example.answers)
        elif so_far is not None:
            yield so_far
        so_far = example
    if so_far is not None:
        yield so_far


def _messages(turns: Iterable[Turn]) -> list[dict[str, str]]:
    return [turn.message for turn in turns]


def _check_length(length: int, max_length: int) -> None:
    if length > max_length:
        raise TooLong(
            f"{length} tokens with its prompt, more than max_length {max_length} (answers are never cut)"
        )


class Batches:
    """Examples in batches, epoch after epoch; what a step sees depends on the seed and the step only.

    Examples of an epoch are shuffled, sorted by length inside large groups, cut into batches, and the batches
    are shuffled: little padding, and still every example once an epoch. The last batch of an epoch may be
    smaller.
    """

    def __init__(self, examples: Sequence[Example], *, batch_size: int, seed: int) -> None:
        if not examples:
            raise Refused("there are no examples to make batches of")
        if batch_size < 1:
            raise Refused(f"batch_size is {batch_size}; it must be at least 1")
        self._examples = examples
        self._batch_size = batch_size
        self._seed = seed
        self._planned: tuple[int, list[list[int]]] = (0, self._plan(0))

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._examples) // self._batch_size)

    def at(self, step: int) -> list[Example]:
        """The batch of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        return [self._examples[i] for i in self._planned[1][place]]

    def _plan(self, epoch: int) -> list[list[int]]:
        """Indices of every batch of an epoch."""
        chance = random.Random(f"{self._seed}/{epoch}")  # a text seeds alike on every machine and version
        order = list(range(len(self._examples)))
        chance.shuffle(order)
        size, group = self._batch_size, self._batch_size * _SORTED_TOGETHER
        batches: list[list[int]] = []
        for start in range(0, len(order), group):
            together = sorted(order[start : start + group], key=lambda i: len(self._examples[i].ids))
            batches += [together[i : i + size] for i in range(0, len(together), size)]
        chance.shuffle(batches)
        return batches
