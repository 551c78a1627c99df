"""How good a member's answers are: greedy answers to held-out prompts, graded against the references."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.errors import Refused
from heliostat.llm import LLM
from heliostat.tasks.grade import grade
from heliostat.train.data import TooLong, question_ids
from heliostat.train.formats import Record, read_jsonl

LONGEST_ANSWER = 512
"""Tokens after which an answer is cut."""


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
) -> Evaluation:
    """Greedy answers of ``member`` to the prompts of a jsonl file, graded. Raises Refused, with its number, for a bad line.

    Of a conversation the last answer is asked for; the earlier ones are taken from the data. Answers are cut, and
    counted as cut, after ``max_tokens``.
    """
    records = [r for r in read_jsonl(data).records if r.answer is not None][:limit]
    if not records:
        raise Refused(f"{data} holds texts without prompts: there is no answer to grade")
    prompts = [_prompt(llm, record, data) for record in records]
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
