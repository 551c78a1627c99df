"""Make a judge of a family: label prompt by prompt, kept as it goes; fit a probe; choose theta on held-out prompts.

What was labelled lies in ``FAM/judging/<digest of all that labels hang on>``; killed at any time, the same command goes on
from there, and one with another share, recall or seed labels nothing again that is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heliostat.errors import Refused
from heliostat.family import choose
from heliostat.files import locked
from heliostat.judging.asked import Asked, Pair, identity, in_groups, load_pair, read_asked
from heliostat.judging.choice import (
    CHOICES,
    LABELS,
    Point,
    area_under,
    chosen_theta,
    point_at,
    tau_of,
    thetas_of,
)
from heliostat.judging.consequences import Question, Said, answered, known_unacceptable
from heliostat.judging.kept import Kept
from heliostat.judging.labels import SUFFIX, Scored, score
from heliostat.judging.probe import Probe, fit_probe
from heliostat.model.judge import Judge, judge_file, judge_name, write_judge
from heliostat.tasks.grade import METRICS

JUDGING = "judging"
"""Folder of a family for labels."""
GROUP = 16
"""Prompts that are answered in one batch."""
CHECKED = 5
"""One prompt of so many that are learned from decides on the penalty."""
FEW_KNOWN = 20
"""Known unacceptable tokens below which tau is said to be unsure."""

Tell = Callable[[int, int, str], None]
"""Hears (prompts done, prompts in all, what is being done)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Which judge is made, and of what."""

    family: str
    speaker: str
    draft: str
    data: str
    member: str | None = None
    """Whose row answers; None: the speaker alone."""
    name: str | None = None
    """Of the judge; None: SPEAKER-DRAFT."""
    metric: str = "contains"
    """How results are compared."""
    prompts: int | None = None
    """At most; None: all."""
    calibration: int = 100
    """Prompts whose substitutions are followed to their results."""
    labels: str = "suffix"
    """What says whether a token is acceptable: one of LABELS."""
    suffix: int = SUFFIX
    share: float = 0.1
    """Of the known unacceptable tokens, that may be called acceptable."""
    tau: float | None = None
    """The threshold itself, where results cannot be compared."""
    recall: float = 0.9
    """Share of the unacceptable tokens that theta ``recall`` rejects."""
    choice: str = "recall"
    longest: int = 512
    """Tokens of an answer."""
    seed: int = 0

    def __post_init__(self) -> None:
        choose(self.metric, METRICS, what="metric")
        choose(self.choice, CHOICES, what="way to choose theta")
        choose(self.labels, LABELS, what="kind of labels")
        if self.labels == "result" and self.tau is not None:
            raise Refused(f"tau {self.tau} is for labels by suffix only, and labels is 'result'; drop it")
        judge_file(Path(self.family), self.judge)
        for what, share in (("share", self.share), ("recall", self.recall)):
            if not 0 <= share <= 1:
                raise Refused(f"{what} is {share}; it must be from 0 to 1")
        for what, value in (("suffix", self.suffix), ("longest", self.longest)):
            if value < 1:
                raise Refused(f"{what} is {value}; it must be at least 1")

    @property
    def judge(self) -> str:
        return self.name or judge_name(self.speaker, self.draft)


@dataclass(frozen=True, slots=True)
class Labelled:
    """Tokens of some prompts."""

    groups: Tensor  # [M]: the prompt's line
    scores: Tensor  # [M]
    hidden: Tensor  # [M, E]
    prompts: int

    def labels(self, tau: float) -> Tensor:
        """Whether each is acceptable, [M] bool."""
        return self.scores > tau


@dataclass(frozen=True, slots=True)
class Judged:
    """What it came to."""

    path: Path
    judge: Judge
    labels_folder: Path
    tau: float
    known: int
    """Tokens known to be unacceptable."""
    measured: int
    """Prompts whose substitutions told something."""
    tokens: tuple[int, int]
    """Labelled: to learn from, and held out."""
    acceptable: float
    """Share of all labelled tokens."""
    prompts: tuple[int, int]
    too_long: int
    auc: float
    """On held-out tokens."""
    points: Mapping[str, Point]
    """What each theta does to held-out tokens."""
    penalty: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything, in plain values."""
        facts = {k: v for k, v in asdict(self).items() if k not in ("judge", "path", "labels_folder")}
        told = {"path": str(self.path), "labels_folder": str(self.labels_folder)}
        return facts | told | {"theta": self.judge.theta, "thetas": dict(self.judge.thetas)}


def make_judge(
    wish: Wish,
    *,
    tell: Tell = lambda done, total, what: None,
    echo: Callable[[str], None] = lambda line: None,
) -> Judged:
    """Label, fit, choose, write. Raises Refused for what cannot be judged, before anything is labelled where it can be."""
    begin = time.perf_counter()
    pair = load_pair(Path(wish.family), wish.speaker, wish.draft, member=wish.member)
    asked = read_asked(Path(wish.data), pair, most=wish.prompts, seed=wish.seed)
    facts = identity(pair, Path(wish.data), suffix=wish.suffix, metric=wish.metric, longest=wish.longest)
    kept = Kept.open(pair.folder / JUDGING, facts)
    measured = _measured(wish, asked)
    if measured and all(question.reference is None for question in measured):
        echo(
            f"the data has no answers: a result is compared ({wish.metric}) with that of the speaker's own answer"
        )
    with locked(kept.folder / "lock", wait=False):
        label(
            pair,
            kept,
            asked.all,
            measured,
            metric=wish.metric,
            longest=wish.longest,
            suffix=wish.suffix,
            tell=tell,
        )
    known = known_of(kept, measured)
    tau = wish.tau if wish.tau is not None else _tau(wish, known, len(measured), echo)
    return _fitted(wish, pair, kept, asked, tau=tau, known=known, begin=begin)


def _measured(wish: Wish, asked: Asked) -> tuple[Question, ...]:
    """Prompts whose substitutions are followed."""
    if wish.labels == "result":
        return asked.all
    return asked.learned[: wish.calibration] if wish.tau is None else ()


def _tau(wish: Wish, known: Sequence[Sequence[float]], measured: int, echo: Callable[[str], None]) -> float:
    scores = [score for one in known for score in one]
    if not scores:
        raise Refused(
            f"{wish.data}: of {measured} answers {len(known)} can be measured by metric {wish.metric!r}, and no token "
            "changed a result. Needed are prompts that the speaker answers rightly, to the end, with a metric that tells a "
            f"result from its wording ({', '.join(METRICS)}); or give the threshold of scores yourself: --tau -2"
        )
    if wish.labels == "result":
        return 0.0
    if len(scores) < FEW_KNOWN:
        echo(
            f"only {len(scores)} tokens are known to be unacceptable: tau is unsure; more --calibration helps"
        )
    return tau_of(scores, share=wish.share)


def label(
    pair: Pair,
    kept: Kept,
    questions: Sequence[Question],
    measured: Sequence[Question],
    *,
    metric: str,
    longest: int,
    suffix: int = SUFFIX,
    tell: Tell = lambda done, total, what: None,
) -> None:
    """Score every question's answer, and follow substitutions of those ``measured``; what is kept already is left."""
    total, done = len(questions), 0
    wanted = {question.line for question in measured}
    for group in in_groups(questions, GROUP):
        new = [q for q in group if kept.scored(q.line) is None]
        unmeasured = [q for q in group if q.line in wanted and kept.changed(q.line) is None]
        needed = [q for q in group if q in new or q in unmeasured]
        tell(done, total, "answers")
        said = _answers(pair, needed, longest)
        for question in new:
            tell(done, total, "scores")
            kept.keep(question.line, _scored(pair, question, said[question.line], suffix))
            done += question not in unmeasured
        for question in unmeasured:
            tell(done, total, "substitutions")
            scored = kept.scored(question.line)
            assert scored is not None
            case = [(question, said[question.line], scored)]
            room = _room(pair, question, longest)
            (changed,) = known_unacceptable(pair.llm, pair.member, case, metric=metric, longest=room)
            kept.keep_changed(question.line, changed)
            done += 1
        done += len(group) - len(needed)
    tell(total, total, "labelled")


def _answers(pair: Pair, questions: Sequence[Question], longest: int) -> dict[int, Said]:
    """By line; each is cut where it has no room, whoever is answered beside it."""
    prompts, rooms = [q.prompt for q in questions], [_room(pair, q, longest) for q in questions]
    said = answered(pair.llm, pair.member, prompts, [()] * len(prompts), longest=rooms)
    return {question.line: one for question, one in zip(questions, said, strict=True)}


def _room(pair: Pair, question: Question, longest: int) -> int:
    return min(longest, pair.longest - len(question.prompt))


def _scored(pair: Pair, question: Question, said: Said, suffix: int) -> Scored:
    return score(
        pair.row, pair.modules, pair.draft, question.prompt, said.ids, suffix=suffix, reads=pair.reads
    )


def known_of(kept: Kept, measured: Sequence[Question]) -> list[list[float]]:
    """Scores of the tokens that change the result, of every prompt whose answer is a measure."""
    found = []
    for question in measured:
        scored, changed = kept.scored(question.line), kept.changed(question.line)
        if scored is not None and changed and len(changed) == len(scored):
            found.append([s for s, c in zip(scored.scores.tolist(), changed, strict=True) if c])
    return found


def labelled(kept: Kept, questions: Sequence[Question], *, by: str = "suffix") -> Labelled:
    """Everything that was scored of these prompts; by ``result`` scores are 1 or -1, of answers that are a measure."""
    scores = _by_result if by == "result" else Kept.scored
    all_of_them = [(q.line, scores(kept, q.line)) for q in questions]
    found = [(line, scored) for line, scored in all_of_them if scored is not None and len(scored)]
    if not found:
        raise Refused(
            f"speaker and draft say the same everywhere in {len(questions)} answers: there is nothing to judge"
        )
    return Labelled(
        torch.cat([torch.full((len(scored),), line) for line, scored in found]),
        torch.cat([scored.scores for _, scored in found]),
        torch.cat([scored.hidden for _, scored in found]),
        len(questions),
    )


def _by_result(kept: Kept, line: int) -> Scored | None:
    scored, changed = kept.scored(line), kept.changed(line)
    if scored is None or not changed or len(changed) != len(scored):
        return None
    return replace(scored, scores=1 - 2 * torch.tensor(changed, dtype=torch.float32))


def fit(learned: Labelled, tau: float) -> Probe:
    """The probe of these labels; the penalty is decided by every fifth prompt."""
    lines = learned.groups.unique()
    return fit_probe(learned.hidden, learned.labels(tau), learned.groups, checked=lines[::CHECKED])


def _fitted(
    wish: Wish,
    pair: Pair,
    kept: Kept,
    asked: Asked,
    *,
    tau: float,
    known: Sequence[Sequence[float]],
    begin: float,
) -> Judged:
    learned = labelled(kept, asked.learned, by=wish.labels)
    held_out = labelled(kept, asked.held_out, by=wish.labels)
    probe = fit(learned, tau)
    scores, labels = probe.scores(held_out.hidden).tolist(), held_out.labels(tau).tolist()
    thetas = thetas_of(scores, labels, recall=wish.recall)
    points = {name: point_at(theta, scores, labels) for name, theta in thetas.items()}
    acceptable = float(torch.cat([learned.labels(tau), held_out.labels(tau)]).float().mean())
    auc = area_under(scores, labels)
    counts = {
        "tau": tau,
        "auc": auc,
        "labels": len(learned.scores) + len(held_out.scores),
        "acceptable": acceptable,
    }
    asked_for = {k: v for k, v in asdict(wish).items() if k not in ("family", "speaker", "draft", "name")}
    judge = Judge(
        probe.weight,
        probe.bias,
        pair.speaker.digest,
        pair.draft.digest,
        theta=chosen_theta(wish.choice, thetas),
        thetas=thetas,
        speaker_module=wish.speaker,
        draft_module=wish.draft,
        report=counts | {"wish": asked_for},
    )
    return Judged(
        write_judge(pair.folder, wish.judge, judge),
        judge,
        kept.folder,
        tau,
        known=sum(map(len, known)),
        measured=len(known),
        tokens=(len(learned.scores), len(held_out.scores)),
        acceptable=acceptable,
        prompts=(len(asked.learned), len(asked.held_out)),
        too_long=asked.too_long,
        auc=auc,
        points=points,
        penalty=probe.penalty,
        seconds=time.perf_counter() - begin,
    )
