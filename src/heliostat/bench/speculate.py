"""Rules for drafted tokens side by side on one family: right answers, accepted length, tokens a second, what judges know.

Every point is kept as it is measured (``points.json``): killed at any time, the same command goes on. Speeds are of whole
calls, prompts, scheduling and text included, with as many tokens drafted as the engine itself finds worth it, in turns.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from heliostat.bench.birth import certificate
from heliostat.bench.points import Points
from heliostat.bench.speculated import ALWAYS, LOSSLESS, OFF
from heliostat.build import read_family
from heliostat.engine.request import Request, Sampling
from heliostat.engine.speculation.drafting import Drafted
from heliostat.engine.speculation.verifying import judge_turns, turns_of
from heliostat.engine.speculation.wanted import AHEAD
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.judging.asked import load_pair, read_asked
from heliostat.judging.choice import area_under, point_at
from heliostat.judging.kept import Kept
from heliostat.judging.run import JUDGING, Judged, Wish, identity, label, labelled, make_judge
from heliostat.llm import LLM, Answer
from heliostat.model.judge import read_judge
from heliostat.tasks.grade import grade
from heliostat.train.data import question_ids
from heliostat.train.formats import Record, read_jsonl

NGRAM = "ngram"
CHOSEN = ("judged:recall", "judged:f1")
SWEEP = tuple(f"judged:{theta}" for theta in (0.1, 0.3, 0.5, 0.7, 0.9))
OTHERS = (
    "kl:0.1",
    "kl:0.5",
    "kl:2",
    "topk:2",
    "topk:3",
    "topk:5",
    "entropy:0.1:1",
    "entropy:0.1",
    "entropy:0.2",
)
RULES = (OFF, NGRAM, LOSSLESS, *CHOSEN, *SWEEP, *OTHERS)
PATHS = ("family", "prompts", "test", "held_out", "members", "out")
"""Options that may change between the parts of one measurement: what lies there decides."""
TOGETHER = 16
"""Requests at once where only answers are looked at."""
CALLS = 64
"""Of a judge, to say how long one takes."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What is measured, and of what."""

    family: str
    draft: str
    prompts: str
    """Data that judges learn from."""
    test: str
    """Data with answers, that no judge has seen."""
    held_out: str | None = None
    """The same, put in ways that nothing was trained on."""
    member: str | None = None
    """Whose row answers; None: the base alone."""
    members: Mapping[str, str] = field(default_factory=dict)
    """Other members with the same speaker, and data of their own prompts: what is a judge of one worth to another?"""
    metric: str = "contains"
    tau: float | None = None
    """Threshold of scores, where results cannot be compared."""
    items: int = 200
    """Of each data set, at most."""
    batches: tuple[int, ...] = (1, 2, 4, 8)
    repeats: int = 5
    calls: int = 8
    """Prompts of a turn."""
    seeds: int = 3
    suffixes: tuple[int, ...] = (5, 10, 20, 40)
    fewer: int = 150
    """Prompts for each other suffix, and for each other member."""
    longest: int = 160
    rules: tuple[str, ...] = RULES
    out: str = field(default="out/bench/speculate", compare=False)

    def __post_init__(self) -> None:
        if self.repeats < 5:
            raise Refused(f"repeats is {self.repeats}; medians are of at least 5")
        for what in ("items", "calls", "seeds", "fewer", "longest"):
            if getattr(self, what) < 1:
                raise Refused(f"{what} is {getattr(self, what)}; it must be at least 1")


def measure(wish: Measured, *, tell: Tell = lambda line: None) -> dict[str, Any]:
    """Every point, and a birth certificate. Raises Refused for data or modules that do not fit."""
    out = Path(wish.out)
    out.mkdir(parents=True, exist_ok=True)
    points = Points(out / "points.json", _facts(wish))
    begin = time.perf_counter()
    for seed in range(wish.seeds):
        tell(f"judge {seed}")
        points(f"judge/{seed}", partial(_judge, wish, seed))
    _answers(wish, points, tell)
    _speeds(wish, points, tell)
    tell("the judge's share")
    points("judge_seconds", lambda: _judge_seconds(wish))
    for suffix in wish.suffixes:
        tell(f"suffix {suffix}")
        points(f"suffix/{suffix}", partial(_other, wish, f"n{suffix}", suffix=suffix))
    tell("labels by result")
    if wish.tau is None:
        points("by_result", lambda: _other(wish, "by-result", labels="result"))
    tell("other members")
    points("transfer", lambda: _transfer(wish, tell))
    points(
        "birth",
        lambda: certificate(_command(wish), repeats=wish.repeats, seconds=time.perf_counter() - begin),
    )
    return points.all


def _command(wish: Measured) -> str:
    words = ["heliostat", "bench", "speculate", wish.family, "--draft", wish.draft, "--prompts", wish.prompts]
    words += ["--test", wish.test] + (["--held-out", wish.held_out] if wish.held_out else [])
    members = ",".join(f"{name}={data}" for name, data in wish.members.items())
    return shlex.join(words + (["--members", members] if members else []))


def _facts(wish: Measured) -> dict[str, Any]:
    """What the points hang on, and what a reader must know of it."""
    family = read_family(Path(wish.family))
    row = family.row(wish.member or "base")
    sizes = {name: family.module(name).parameters for name in (row.speaker, wish.draft)}
    data = {
        name: hashlib.sha256(Path(path).read_bytes()).hexdigest()
        for name, path in (
            ("prompts", wish.prompts),
            ("test", wish.test),
            ("held_out", wish.held_out),
            *wish.members.items(),
        )
        if path is not None
    }
    options = {
        k: v for k, v in asdict(wish).items() if k not in ("family", "prompts", "test", "held_out", "out")
    }
    facts = {
        "speaker": row.speaker,
        "parameters": sizes,
        "digests": {name: family.module(name).digest for name in (*row.modules, wish.draft)},
        "data": data,
        **options,
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def _wish(wish: Measured, **other: Any) -> Wish:
    speaker = read_family(Path(wish.family)).row(wish.member or "base").speaker
    usual: dict[str, Any] = {
        "family": wish.family,
        "speaker": speaker,
        "draft": wish.draft,
        "data": wish.prompts,
        "member": wish.member,
        "metric": wish.metric,
        "tau": wish.tau,
        "longest": wish.longest,
    }
    return Wish(**{**usual, **other})


def _name(seed: int) -> str:
    return f"bench-{seed}"


def _told(made: Judged) -> dict[str, Any]:
    facts = made.to_json()
    kept = (
        "tau",
        "known",
        "measured",
        "tokens",
        "acceptable",
        "auc",
        "penalty",
        "thetas",
        "points",
        "seconds",
    )
    told: dict[str, Any] = json.loads(json.dumps({key: facts[key] for key in kept}))
    return told


def _judge(wish: Measured, seed: int) -> dict[str, Any]:
    return _told(make_judge(_wish(wish, name=_name(seed), seed=seed)))


def _llm(wish: Measured, rules: Sequence[str], *, judge: str, adaptive: bool) -> LLM:
    """One that answers by these rules; the first stands for requests that do not say."""
    drafts = NGRAM if NGRAM in rules else wish.draft
    verify = [LOSSLESS if rule in (OFF, NGRAM) else rule for rule in rules]
    judged = judge if any(rule.startswith("judged") for rule in rules) else None
    members = [wish.member or "base"]
    return LLM(
        wish.family,
        members=members,
        draft=drafts,
        verify=verify,
        judge=judged,
        adaptive=adaptive,
        cache_mib=128,
    )


def _records(wish: Measured, path: str) -> list[Record]:
    found = [r for r in read_jsonl(path).records if r.answer is not None][: wish.items]
    if not found:
        raise Refused(f"{path} has no prompts with answers: there is nothing to grade")
    return found


def _answers(wish: Measured, points: Points, tell: Tell) -> None:
    """Accuracy and accepted length by rule, of both sets, with as many tokens drafted as are allowed."""
    sets = {"told": wish.test} | ({"held out": wish.held_out} if wish.held_out else {})
    for seed in range(wish.seeds):
        wanted = wish.rules if seed == 0 else [rule for rule in wish.rules if rule in CHOSEN]
        for part in ([NGRAM] if NGRAM in wanted else [], [rule for rule in wanted if rule != NGRAM]):
            missing = [
                (n, r) for r in part for n in sets if f"answers/{seed}/{r}/{n}" not in points.all["points"]
            ]
            if not missing:
                continue
            llm = _llm(wish, part, judge=_name(seed), adaptive=False)
            for name, rule in missing:
                tell(f"answers by {rule}, {name}, seed {seed}")
                points(
                    f"answers/{seed}/{rule}/{name}",
                    partial(_graded, wish, llm, rule, sets[name]),
                )


def _graded(wish: Measured, llm: LLM, rule: str, path: str) -> dict[str, float]:
    records = _records(wish, path)
    answers = _said(wish, llm, rule, records, TOGETHER)
    right = [grade(wish.metric, a.text, r.answer or "") for a, r in zip(answers, records, strict=True)]
    tokens = sum(len(a.ids) for a in answers)
    accepted, judged = (sum(getattr(a.speculated, what) for a in answers) for what in ("accepted", "judged"))
    drafted = sum(a.speculated.drafted for a in answers)
    return {
        "accuracy": sum(right) / len(right),
        "items": len(right),
        "tokens": tokens,
        "accepted_length": tokens / max(1, tokens - accepted),
        "accepted": accepted / max(1, drafted),
        "judged": judged / max(1, tokens),
    }


def _said(wish: Measured, llm: LLM, rule: str, records: Sequence[Record], batch: int) -> list[Answer]:
    """Greedy answers, so many requests at once, the next ones when all have ended."""
    longest = llm.engine.max_length
    asked = [question_ids(record, llm.tokenizer, max_length=longest - 1) for record in records]
    who, how = wish.member or "base", LOSSLESS if rule in (NGRAM, ALWAYS) else rule
    found: list[Answer] = []
    for at in range(0, len(asked), batch):
        found += llm.generate(asked[at : at + batch], member=who, max_tokens=wish.longest, speculation=how)
    return found


def _speeds(wish: Measured, points: Points, tell: Tell) -> None:
    """Tokens a second of every rule in turns: each repeat asks all of them the same prompts, new ones every time."""
    wanted = [f"speed/{batch}/{again}" for batch in wish.batches for again in range(wish.repeats)]
    if all(name in points.all["points"] for name in wanted):
        return
    tell("loading one engine a rule")
    llms = {rule: _llm(wish, [rule], judge=_name(0), adaptive=True) for rule in wish.rules}
    llms[ALWAYS] = _llm(wish, [LOSSLESS], judge=_name(0), adaptive=False)
    records = _records(wish, wish.test)
    for rule, llm in llms.items():
        for batch in wish.batches:  # so that every engine has measured its own passes
            _said(wish, llm, rule, records[-wish.calls :], batch)
    for batch in wish.batches:
        for again in range(wish.repeats):
            first = again * wish.calls % max(1, len(records) - 2 * wish.calls + 1)
            part = records[first : first + wish.calls]
            tell(f"speed at batch {batch}, {again + 1} of {wish.repeats}")
            points(f"speed/{batch}/{again}", partial(_turn, wish, llms, part, batch))


def _turn(wish: Measured, llms: dict[str, LLM], records: Sequence[Record], batch: int) -> dict[str, Any]:
    found = {}
    for rule, llm in llms.items():
        begin = time.perf_counter()
        answers = _said(wish, llm, rule, records, batch)
        seconds = time.perf_counter() - begin
        tokens = sum(len(a.ids) for a in answers)
        drafted = sum(a.speculated.drafted for a in answers)
        found[rule] = {"tokens": tokens, "seconds": seconds, "drafted": drafted}
    return found


def _judge_seconds(wish: Measured) -> dict[str, float]:
    """What judging adds to a pass with eight drafted tokens for one request, and for eight requests; median of CALLS."""
    judge, drafted = read_judge(Path(wish.family), _name(0)), list(range(AHEAD))
    row, sampling = Row("base", "base", "base", "base"), Sampling()
    found = {}
    for count in (1, 8):
        requests = [
            Request(f"r{n}", row=row, digests={}, prompt=(1,), sampling=sampling) for n in range(count)
        ]
        rows = [request for request in requests for _ in range(1 + AHEAD)]
        hidden, times = torch.randn(len(rows), len(judge.weight)), []
        for _ in range(CALLS):
            turns = turns_of(rows, {request.id: Drafted(drafted) for request in requests})
            begin = time.perf_counter()
            judge_turns(turns, [hidden], lambda request: (judge, judge.theta))
            times.append(time.perf_counter() - begin)
        found[str(count * AHEAD)] = sorted(times)[CALLS // 2]
    return found


def _other(wish: Measured, name: str, **other: Any) -> dict[str, Any]:
    """A judge of other labels, and what answers it gives."""
    name = f"bench-{name}"
    made = make_judge(_wish(wish, name=name, prompts=wish.fewer, **other))
    llm = _llm(wish, CHOSEN, judge=name, adaptive=False)
    return _told(made) | {"answers": {rule: _graded(wish, llm, rule, wish.test) for rule in CHOSEN}}


def _transfer(wish: Measured, tell: Tell) -> dict[str, Any]:
    """A judge of every member's prompts, by what it does to the tokens of every other member with the same speaker."""
    speaker = read_family(Path(wish.family)).row(wish.member or "base").speaker
    made, tokens = {}, {}
    rows: list[tuple[str | None, str]] = [(wish.member, wish.prompts), *wish.members.items()]
    for member, data in rows:
        who = member or speaker
        tell(f"judge of {who}")
        own = _wish(wish, name=f"bench-of-{who}", member=member, data=data, prompts=wish.fewer)
        made[who] = make_judge(own)
        tokens[who] = _tokens(own)
    found: dict[str, Any] = {}
    for learned, judged in made.items():
        for asked, (hidden, scores) in tokens.items():
            probabilities = judged.judge.scores(hidden).tolist()
            labels = (scores > made[asked].tau).tolist()
            point = point_at(judged.judge.thetas["recall"], probabilities, labels)
            found[f"{learned} -> {asked}"] = {
                "auc": _number(area_under(probabilities, labels)),
                "accepted": point.accepted,
                "recall": point.recall,
                "precision": point.precision,
                "tokens": len(labels),
            }
    return found


def _tokens(wish: Wish) -> tuple[torch.Tensor, torch.Tensor]:
    """States and scores of the held-out prompts' tokens, which are labelled already."""
    pair = load_pair(Path(wish.family), wish.speaker, wish.draft, member=wish.member)
    asked = read_asked(Path(wish.data), pair, most=wish.prompts, seed=wish.seed)
    facts = identity(pair, Path(wish.data), suffix=wish.suffix, metric=wish.metric, longest=wish.longest)
    kept = Kept.open(pair.folder / JUDGING, facts)
    label(pair, kept, asked.held_out, (), metric=wish.metric, longest=wish.longest, suffix=wish.suffix)
    found = labelled(kept, asked.held_out)
    return found.hidden, found.scores


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
