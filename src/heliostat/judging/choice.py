"""Thresholds: from which score on a token is called acceptable, from which probability on a judge is believed. No torch."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from heliostat.errors import Refused
from heliostat.family import choose

LABELS = {
    "suffix": "how well the speaker's answer would have gone on behind it",
    "result": "whether the result stays the same when the speaker goes on from it; many times the work",
}
"""Ways to say whether a token is acceptable."""
CHOICES = {
    "recall": "rejects at least --recall of the unacceptable tokens",
    "f1": "best F1 of the acceptable tokens",
}
"""Ways to choose theta, and what each of them is."""


def tau_of(unacceptable: Sequence[float], *, share: float) -> float:
    """The score above which a token is acceptable: at most ``share`` of these known unacceptable ones are.

    The direction is ours: print leaves it open. Refused where none is known.
    """
    if not unacceptable:
        raise Refused("no token is known to be unacceptable, so there is no threshold of scores to be found")
    ordered = sorted(unacceptable)
    rejected = math.ceil((1 - share) * len(ordered) - 1e-9)
    return ordered[rejected - 1] if rejected else -math.inf


@dataclass(frozen=True, slots=True)
class Point:
    """What a theta does to labelled tokens that were held out."""

    theta: float
    accepted: float
    """Share of all tokens that are accepted."""
    recall: float
    """Share of the unacceptable tokens that are rejected."""
    precision: float
    """Share of what is accepted that is acceptable; 1 where nothing is."""
    f1: float
    """Of the acceptable tokens: harmonic mean of precision and of the share of them that is accepted."""


def point_at(theta: float, scores: Sequence[float], labels: Sequence[bool]) -> Point:
    """What accepting scores above ``theta`` does; a label says whether its token is acceptable."""
    taken = [label for score, label in zip(scores, labels, strict=True) if score > theta]
    good, bad = sum(labels), len(labels) - sum(labels)
    right = sum(taken)
    wrong = len(taken) - right
    return Point(
        theta,
        accepted=len(taken) / max(1, len(labels)),
        recall=1 - wrong / bad if bad else 1.0,
        precision=right / len(taken) if taken else 1.0,
        f1=2 * right / (len(taken) + good) if taken or good else 0.0,
    )


def thetas_of(scores: Sequence[float], labels: Sequence[bool], *, recall: float) -> dict[str, float]:
    """Theta by each of CHOICES, from held-out scores in [0, 1]; of equally good ones the highest."""
    pairs = zip(scores, labels, strict=True)
    ordered = sorted((pair for pair in pairs if pair[0] > 0), reverse=True)  # no theta accepts a score of 0
    good, bad = sum(labels), len(labels) - sum(labels)
    allowed = math.floor((1 - recall) * bad + 1e-9)
    best, chosen = (0.0, math.inf), math.inf
    right = wrong = 0
    for at, (score, label) in enumerate(ordered):
        right, wrong = right + label, wrong + (not label)
        following = ordered[at + 1][0] if at + 1 < len(ordered) else 0.0
        if following == score:
            continue  # equal scores are accepted together
        theta = (score + following) / 2
        f1 = 2 * right / (right + wrong + good) if right else 0.0
        if f1 > best[0]:
            best = (f1, theta)
        if wrong <= allowed:
            chosen = theta
    return {"recall": chosen, "f1": best[1]}


def chosen_theta(name: str, thetas: dict[str, float]) -> float:
    """The theta of that way; refused with the others for an unknown one."""
    return choose(name, thetas, what="way to choose theta")


def area_under(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Area under the ROC curve: how often an acceptable token has the higher score of two; nan where one kind is missing."""
    bad = sorted(score for score, label in zip(scores, labels, strict=True) if not label)
    good = [score for score, label in zip(scores, labels, strict=True) if label]
    if not bad or not good:
        return math.nan
    below = 0.0
    for score in good:
        upper = bisect_right(bad, score)
        lower = bisect_right(bad, math.nextafter(score, -math.inf))
        below += (upper + lower) / 2
    return below / (len(bad) * len(good))
