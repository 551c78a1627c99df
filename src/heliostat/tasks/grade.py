"""Judges an answer against a reference by one of three metrics: exact, contains, command."""

import json
import re
from typing import Any

from heliostat.errors import Refused

METRICS = {
    "exact": "the same text",
    "contains": "the final answer stands in it",
    "command": "the same JSON value",
}
"""Name -> what is right by it, for people; ``grade`` says it in full."""
DEFAULT_METRIC = "exact"
METRICS_SHOWN = "; ".join(f"{name}: {right}" for name, right in METRICS.items())
_MARK = re.compile(r"answer\s*(?:is\s*)?:|####", re.IGNORECASE)


def grade(metric: str, answer: str, reference: str) -> bool:
    """Whether `answer` is right.

    exact:    the same text, white space at both ends aside.
    contains: the reference's final answer (see `final_answer`) stands in the answer as whole words or a whole
              number, in any case: "12" is in "so 12." and "x=12,", not in "312", "-12", "1,200" or "12.5".
              If both texts mark their final answer, only what is behind the answer's last mark counts: a
              number on the way to a wrong result is no hit.
    command:  both are strict JSON of the same value; the order of keys and white space are free; text around
              the JSON, NaN and repeated keys are wrong; 1, 1.0, "1" and true all differ.

    Refused: an unknown metric; for `contains` an empty reference; for `command` a reference that is not JSON.
    """
    if metric == "exact":
        return answer.strip() == reference.strip()
    if metric == "contains":
        return _contains(answer, reference)
    if metric == "command":
        return _command(answer, reference)
    raise Refused(f"unknown metric {metric!r}: choose one of {', '.join(METRICS)}")


def final_answer(text: str) -> str:
    """What a worked text ends in: what follows its last "answer:" or "####", else its last non-empty line.

    White space around it and a full stop behind it are dropped.
    """
    marked = _behind_mark(text)
    lines = [line for line in (text if marked is None else marked).splitlines() if line.strip()]
    if not lines:
        return ""
    return lines[0 if marked is not None else -1].strip().removesuffix(".").rstrip()


def _behind_mark(text: str) -> str | None:
    marks = list(_MARK.finditer(text))
    return text[marks[-1].end() :] if marks else None


def _contains(answer: str, reference: str) -> bool:
    wanted = final_answer(reference)
    if not wanted:
        raise Refused(f"metric 'contains' needs a reference with a final answer, got {reference!r}")
    marked = _behind_mark(answer)
    if marked is not None and _behind_mark(reference) is not None:
        answer = marked
    # A minus, or a digit with point or comma, on either side would make it part of another number.
    before = r"(?<!\w)(?<!\d[.,])(?<!-)" if wanted[0].isalnum() else r"(?<!\w)" if wanted[0] == "-" else ""
    after = r"(?!\w)(?![.,]\d)" if wanted[-1].isalnum() else ""
    return re.search(before + re.escape(wanted) + after, answer, re.IGNORECASE) is not None


def _command(answer: str, reference: str) -> bool:
    try:
        wanted = _canonical(reference)
    except ValueError as error:
        raise Refused(f"metric 'command' needs a JSON reference, got {reference!r}: {error}") from error
    try:
        return _canonical(answer) == wanted
    except (ValueError, RecursionError):
        return False


def _canonical(text: str) -> str:
    value = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    return json.dumps(value, sort_keys=True)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
