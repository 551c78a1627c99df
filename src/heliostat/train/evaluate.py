"""How good a member's answers are: greedy answers to held-out prompts, graded against the references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.build import Loaded
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.llm import LLM
from heliostat.model.tokenizer import Tokenizer
from heliostat.tasks.grade import grade
from heliostat.train.data import TooLong, question_ids
from heliostat.train.formats import Record, read_jsonl

LONGEST_ANSWER = 512
"""Tokens after which an answer is cut."""
CACHE_MIB = 256
"""Most memory for the pages of an evaluation in the course of a run."""
IN_TRAINING = "in training"


@dataclass(frozen=True, slots=True)
class Graded:
    """One prompt, what was said, and whether it was right."""

    prompt: str
    """Its last question; see Record.asked."""
    answer: str
    reference: str
    right: bool


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All graded answers of one member to one set."""

    member: str
    metric: str
    items: tuple[Graded, ...]
    cut: int = 0
    """Answers that were ended by their length: at LONGEST_ANSWER tokens, or where no room was left."""

    @property
    def accuracy(self) -> float:
        """Share of right answers, in [0, 1]."""
        return sum(item.right for item in self.items) / len(self.items)

    @property
    def facts(self) -> dict[str, Any]:
        """What the family remembers of it."""
        accuracy = round(self.accuracy, 4)
        return {"metric": self.metric, "accuracy": accuracy, "items": len(self.items), "cut": self.cut}


def evaluate(
    llm: LLM,
    member: str,
    data: str | Path,
    *,
    metric: str,
    limit: int | None = None,
    max_tokens: int = LONGEST_ANSWER,
    skip_bad: bool = False,
) -> Evaluation:
    """Greedy answers of ``member`` to the prompts of a jsonl file, graded. Raises Refused, with its number, for a bad line.

    Of a conversation the last answer is asked for; the earlier ones are taken from the data. Answers are cut, and
    counted as cut, after ``max_tokens``. With ``skip_bad`` lines that cannot be read are left out.
    """
    records = [r for r in read_jsonl(data, skip_bad=skip_bad).records if r.answer is not None][:limit]
    if not records:
        raise Refused(f"{data} holds texts without prompts: there is no answer to grade")
    prompts = [_prompt(llm, record, data) for record in records]
    return _asked(llm, member, records, prompts, metric=metric, max_tokens=max_tokens)


def accuracy_in_training(
    records: Sequence[Record],
    row: Row,
    modules: Mapping[str, Loaded],
    tokenizer: Tokenizer,
    *,
    metric: str,
) -> float:
    """Share of right answers, in [0, 1], of a row whose modules are being trained; they are left as they are."""
    llm = LLM.of(modules, {IN_TRAINING: row}, tokenizer, cache_mib=CACHE_MIB)
    longest = max(len(tokenizer.encode(r.answer or "")) for r in records)
    asked = []
    for record in records:
        with suppress(Refused):  # longer than the pages hold: not counted
            asked.append((record, question_ids(record, tokenizer, max_length=llm.engine.max_length - 1)))
    if not asked:
        return float("nan")
    kept, prompts = [r for r, _ in asked], [p for _, p in asked]
    # Early in a run a member knows no end: what is far longer than any right answer is wrong.
    most = min(LONGEST_ANSWER, 2 * longest + 16)
    return _asked(llm, IN_TRAINING, kept, prompts, metric=metric, max_tokens=most).accuracy


def _asked(
    llm: LLM,
    member: str,
    records: Sequence[Record],
    prompts: Sequence[list[int]],
    *,
    metric: str,
    max_tokens: int,
) -> Evaluation:
    # The engine ends an answer at its own request's length: a long prompt takes no room from the others.
    answers = llm.generate(prompts, member=member, max_tokens=max_tokens)
    graded = [
        Graded(r.asked, a.text, r.answer or "", grade(metric, a.text, r.answer or ""))
        for r, a in zip(records, answers, strict=True)
    ]
    return Evaluation(member, metric, tuple(graded), sum(a.finish_reason == "length" for a in answers))


def _prompt(llm: LLM, record: Record, data: str | Path) -> list[int]:
    longest = llm.engine.max_length
    try:
        return question_ids(record, llm.tokenizer, max_length=longest - 1)
    except TooLong as error:
        raise Refused(
            f"{data}:{record.line}: the prompt is too long, a request here has at most {longest} tokens, answer "
            f"included: {error}"
        ) from error
    except Refused as error:
        raise Refused(f"{data}:{record.line}: {error}") from error
