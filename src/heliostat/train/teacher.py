"""A teacher's own answers as data: what a module says to prompts, so that another row can learn to say it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from heliostat.build import Loaded
from heliostat.engine.engine import longest_that_fits
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.llm import LLM
from heliostat.model.tokenizer import Tokenizer
from heliostat.train.data import Examples, TooLong, answered_by, question_ids
from heliostat.train.formats import BadLine, read_jsonl

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

    An answer that is cut by ``max_length``, or by what CACHE_MIB holds where that is less, is left out.
    """
    longest = min(max_length, longest_that_fits(teacher.model, cache_mib=CACHE_MIB))
    records = read_jsonl(path, skip_bad=skip_bad, prompts=True)
    prompts, long = [], []
    for record in records.records:
        try:
            ids = question_ids(record, tokenizer, max_length=max_length - 1)
        except TooLong as reason:
            if too_long == "refuse":
                raise Refused(f"{path}:{record.line}: {reason}") from reason
            long.append(BadLine(record.line, str(reason)))
            continue
        if len(ids) < longest:
            prompts.append((record.line, ids))
        else:
            long.append(
                BadLine(record.line, f"{len(ids)} tokens, and memory for the teacher holds {longest}")
            )
    rows = {"teacher": _alone(teacher.name)}
    llm = LLM.of({teacher.name: teacher}, rows, tokenizer, max_length=longest, cache_mib=CACHE_MIB)
    answers = llm.generate([ids for _, ids in prompts], member="teacher", max_tokens=longest)
    examples = []
    for (line, ids), answer in zip(prompts, answers, strict=True):
        if answer.finish_reason == "stop":
            examples.append(answered_by(ids, answer.ids))
        else:
            long.append(BadLine(line, f"the teacher's answer did not end within {longest} tokens"))
    if not examples:
        raise Refused(f"{path}: the teacher ended no answer within {_limit(longest, max_length)}")
    return Examples(Path(path), records.format, tuple(examples), records.bad, tuple(long))


def _limit(longest: int, max_length: int) -> str:
    if longest == max_length:
        return f"max_length {max_length}"
    return f"{longest} tokens, which is what {CACHE_MIB} MiB of pages hold (max_length is {max_length})"


def _alone(name: str) -> Row:
    return Row(name, name, name, name)
