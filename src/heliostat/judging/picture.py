"""What a judge does to whole answers: accuracy and accepted length over theta, on held-out prompts; and their picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from heliostat.errors import Refused
from heliostat.files import atomic_write_text
from heliostat.judging.asked import Asked
from heliostat.judging.consequences import Question
from heliostat.llm import LLM
from heliostat.model.judge import Judge
from heliostat.plot import lines
from heliostat.tasks.grade import grade

THETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Drawn beside those that were chosen, and beside exact speculation (inf)."""
MOST = 100
"""Held-out prompts that are answered for the picture."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Answers at one theta."""

    theta: float
    accuracy: float
    """Share of right answers where the data has answers, else of those with the result of the speaker's own."""
    accepted_length: float
    """Tokens said for each pass of the speaker that verified drafts: accepted ones and one of its own."""
    judged: float
    """Share of the answers' tokens that only the judge let pass."""


def thetas_drawn(judge: Judge) -> list[float]:
    """All thetas of a picture, ascending; exact speculation last."""
    return sorted({*THETAS, *judge.thetas.values(), math.inf})


def sweep(
    folder: Path,
    member: str,
    judge: Judge,
    name: str,
    asked: Asked,
    *,
    metric: str,
    longest: int,
    tell: Callable[[int, int, str], None],
) -> list[Answered]:
    """Greedy answers to held-out prompts at every theta, always drafting as far as is allowed; exact speculation last."""
    rules = ["lossless" if math.isinf(t) else f"judged:{t!r}" for t in thetas_drawn(judge)]
    llm = LLM(folder, members=[member], draft=judge.draft_module, verify=rules, judge=name, adaptive=False)
    questions, found = asked.held_out[:MOST], []
    prompts = [list(question.prompt) for question in questions]
    own = [a.text for a in llm.generate(prompts, member=member, max_tokens=longest, speculation="off")]
    for number, (theta, rule) in enumerate(zip(thetas_drawn(judge), rules, strict=True)):
        tell(number, len(rules), f"answers by {rule}")
        answers = llm.generate(prompts, member=member, max_tokens=longest, speculation=rule)
        right = [
            _right(metric, a.text, question, text)
            for a, question, text in zip(answers, questions, own, strict=True)
        ]
        tokens = sum(len(a.ids) for a in answers)
        accepted = sum(a.speculated.accepted for a in answers)
        judged = sum(a.speculated.judged for a in answers)
        passes = max(1, tokens - accepted)
        found.append(Answered(theta, sum(right) / len(right), tokens / passes, judged / max(1, tokens)))
    tell(len(rules), len(rules), "answered")
    return found


def _right(metric: str, text: str, question: Question, own: str) -> bool:
    reference = own if question.reference is None else question.reference
    if not reference.strip():
        return text == own
    try:
        return grade(metric, text, reference)
    except Refused:  # an answer of its own without a result; of the data's own answers it is said
        if question.reference is not None:
            raise
        return text == own


def draw(points: Sequence[Answered], path: Path, *, title: str) -> None:
    """Accepted length, and dashed the accuracy, over theta; exact speculation stands at 1."""
    at = [(min(point.theta, 1.0), point) for point in points]
    picture = lines(
        {"tokens a pass": [(x, point.accepted_length) for x, point in at]},
        title=title,
        x="theta (1: exact)",
        y="tokens a verifying pass",
        y_from_zero=True,
        shares={"right answers": [(x, point.accuracy) for x, point in at]},
    )
    atomic_write_text(path, picture)
