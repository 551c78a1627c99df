"""A teacher's own answers as data: what a module says to prompts, so that another row can learn to say it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from heliostat.build import Loaded
from heliostat.engine.engine import longest_that_fits
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.llm import LLM
from heliostat.model.tokenizer import Tokenizer
from heliostat.train.data import Examples, answered_by, question_ids, sift
from heliostat.train.formats import BadLine, scan

MOST_UNENDED = 0.1
"""Share of answers that may come to no end, of those that were to: beyond it the limit is wrong, not the prompts."""
CACHE_MIB = 1024
"""Most memory for the pages of the teacher while it answers; gone before anything is trained."""


def taught_examples(
    path: str | Path,
    tokenizer: Tokenizer,
    teacher: Loaded,
    *,
    max_length: int,
    skip_bad: bool = False,
    too_long: Literal["refuse", "skip"] = "refuse",
) -> Examples:
    """Prompts of a jsonl file with the teacher's greedy answers.

    An answer that is cut by ``max_length``, or by what CACHE_MIB holds where that is less, is left out; Refused
    where these are more than MOST_UNENDED of all, unless ``too_long="skip"``.
    """
    longest = min(max_length, longest_that_fits(teacher.model, cache_mib=CACHE_MIB))
    asked = questions(path, tokenizer, max_length=max_length, skip_bad=skip_bad, too_long=too_long)
    fitting = [(line, ids) for line, ids in asked.prompts if len(ids) < longest]
    long = [
        *asked.too_long,
        *(
            BadLine(line, f"{len(ids)} tokens, and memory for the teacher holds {longest}")
            for line, ids in asked.prompts
            if len(ids) >= longest
        ),
    ]
    rows = {"teacher": _alone(teacher.name)}
    llm = LLM.of({teacher.name: teacher}, rows, tokenizer, max_length=longest, cache_mib=CACHE_MIB)
    answers = llm.generate([ids for _, ids in fitting], member="teacher", max_tokens=longest)
    examples = []
    for (line, ids), answer in zip(fitting, answers, strict=True):
        if answer.finish_reason == "stop":
            examples.append(answered_by(ids, answer.ids))
        else:
            long.append(BadLine(line, f"the teacher's answer did not end within {longest} tokens"))
    limit, unended = _limit(longest, max_length), len(fitting) - len(examples)
    if not examples:
        raise Refused(f"{path}: the teacher ended no answer within {limit}")
    if too_long == "refuse" and unended > MOST_UNENDED * len(fitting):
        raise Refused(
            f"{path}: {unended} of {len(fitting)} answers of the teacher did not end within {limit}: raise "
            "max_length, or say --too-long skip to learn from the others alone"
        )
    return Examples(Path(path), asked.format, tuple(examples), asked.bad, tuple(long))


@dataclass(frozen=True, slots=True)
class Questions:
    """What a file asks, and what of it was left out."""

    format: str
    prompts: tuple[tuple[int, list[int]], ...]
    """(line, token ids) of each prompt."""
    bad: tuple[BadLine, ...]
    too_long: tuple[BadLine, ...]


def questions(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    skip_bad: bool,
    too_long: Literal["refuse", "skip"],
) -> Questions:
    """The prompts of a jsonl file; all bad lines are refused in one message, unless ``skip_bad``."""
    found = scan(path, prompts=True)
    sifted = sift(
        found,
        lambda record: (record.line, question_ids(record, tokenizer, max_length=max_length - 1)),
        what="prompt",
        skip_bad=skip_bad,
        too_long=too_long,
    )
    return Questions(found.format, sifted.made, sifted.bad, sifted.too_long)


def asked_examples(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    skip_bad: bool = False,
    too_long: Literal["refuse", "skip"] = "refuse",
) -> Examples:
    """The prompts of a file with answers of a likely length, for counting before a teacher has spoken.

    As long as the data's own answer to that prompt where there is one; else as long as is allowed, so that nothing
    takes more than was said.
    """
    asked = questions(path, tokenizer, max_length=max_length, skip_bad=skip_bad, too_long=too_long)
    known = {r.line: len(tokenizer.encode(r.answer)) + 1 for r in scan(path).records if r.answer is not None}
    examples = []
    for line, ids in asked.prompts:
        room = max_length - len(ids)
        examples.append(answered_by(ids, [0] * min(room, known.get(line, room))))
    return Examples(Path(path), asked.format, tuple(examples), asked.bad, asked.too_long)


def _limit(longest: int, max_length: int) -> str:
    if longest == max_length:
        return f"max_length {max_length}"
    return f"{longest} tokens, which is what {CACHE_MIB} MiB of pages hold (max_length is {max_length})"


def _alone(name: str) -> Row:
    return Row(name, name, name, name)
