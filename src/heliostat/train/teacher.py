"""A teacher's own answers as data: what a module says to prompts, so that another row can learn to say it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from heliostat.build import Loaded
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.llm import LLM
from heliostat.model.tokenizer import Tokenizer
from heliostat.train.data import Examples, TooLong, answered_by, question_ids
from heliostat.train.formats import BadLine, read_jsonl


def taught_examples(
    path: str | Path,
    tokenizer: Tokenizer,
    teacher: Loaded,
    *,
    max_length: int,
    skip_bad: bool = False,
    too_long: Literal["refuse", "skip"] = "refuse",
) -> Examples:
    """Prompts of a jsonl file with the teacher's greedy answers. An answer that is cut by max_length is left out."""
    records = read_jsonl(path, skip_bad=skip_bad, prompts=True)
    prompts, long = [], []
    for record in records.records:
        try:
            prompts.append((record.line, question_ids(record, tokenizer, max_length=max_length - 1)))
        except TooLong as reason:
            if too_long == "refuse":
                raise Refused(f"{path}:{record.line}: {reason}") from reason
            long.append(BadLine(record.line, str(reason)))
    llm = LLM.of({teacher.name: teacher}, {"teacher": _alone(teacher.name)}, tokenizer, max_length=max_length)
    answers = llm.generate([ids for _, ids in prompts], member="teacher", max_tokens=max_length)
    examples = []
    for (line, ids), answer in zip(prompts, answers, strict=True):
        if answer.finish_reason == "stop":
            examples.append(answered_by(ids, answer.ids))
        else:
            long.append(BadLine(line, f"the teacher's answer did not end within max_length {max_length}"))
    if not examples:
        raise Refused(f"{path}: the teacher ended no answer within max_length {max_length}")
    return Examples(Path(path), records.format, tuple(examples), records.bad, tuple(long))


def _alone(name: str) -> Row:
    return Row(name, name, name, name)
