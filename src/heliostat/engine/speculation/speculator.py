"""Speculation in an engine: who drafts how much before a step, what came of it after the step has run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from heliostat.build import Loaded
from heliostat.engine.fitting import refuse_shape
from heliostat.engine.request import Request
from heliostat.engine.runner import Runner
from heliostat.engine.speculation.drafting import Draft, Drafted, LookUp, OnItsPages, OnOwnPages, Speech
from heliostat.engine.speculation.lengths import Lengths, Took, Wish
from heliostat.engine.speculation.rule import Rule
from heliostat.engine.speculation.verifying import Turn, judge_turns
from heliostat.engine.speculation.wanted import AHEAD, NGRAM
from heliostat.engine.step import Step
from heliostat.errors import Refused
from heliostat.model.config import ModelConfig
from heliostat.model.judge import Judge


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """Who drafts for the requests of an engine."""

    module: Loaded | None = None
    """None: nobody, it is looked up in the text."""
    reads: bool = False
    """Whether the module reads the speaker's pages; else it has a page chain of its own for every request."""
    judges: Mapping[str, Judge] = field(default_factory=dict)
    """By the digest of whose states they read."""
    ahead: int = AHEAD
    """Most tokens drafted for a request in a step."""
    adaptive: bool = True
    """Whether less is drafted, or nothing, where measurements say that it would take longer."""

    @property
    def name(self) -> str:
        """What drafts."""
        return NGRAM if self.module is None else self.module.name

    def __post_init__(self) -> None:
        if not 1 <= self.ahead <= 64:
            raise Refused(f"{self.ahead} drafted tokens a step; allowed is 1 to 64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What an engine has for its requests, and so for what is drafted."""

    pages: int
    max_length: int
    max_tokens_per_step: int
    eos: Sequence[int]


class Speculator:
    """Between an engine's scheduler and its passes. One owner calls it, in the order ``plan``, ``draft``, ``judge``,
    ``note``, ``end`` for every step."""

    def __init__(
        self,
        drafting: Drafting,
        runner: Runner,
        room: Room,
        *,
        config: ModelConfig,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``runner``: the engine's. Refused where a module that reads its pages has another shape."""
        self.drafting, self._room, self.clock = drafting, room, clock
        self.lengths = Lengths(drafting.ahead, drafting.adaptive)
        self._began = self._drafted = self._spoken = 0.0
        self._own: Runner | None = None
        self.drafter: Draft = LookUp()
        if drafting.module is not None:
            self.drafter = self._speaking(drafting.module, runner, config)

    def _speaking(self, module: Loaded, runner: Runner, config: ModelConfig) -> Draft:
        if self.drafting.reads:
            refuse_shape(module.name, module.model.config, config)
        size = runner.pool.keys.shape[2]
        named = {module.name: module}
        pool = runner.pool if self.drafting.reads else None
        own = self._own = Runner(named, pages=self._room.pages, page_size=size, pool=pool)
        speech = Speech(
            module,
            own,
            self._room.eos,
            config.vocabulary,
            note=self.lengths.passed,
            clock=lambda: self.clock(),
        )
        if self.drafting.reads:
            return OnItsPages(speech)
        return OnOwnPages(
            speech,
            digest=f"{module.digest}/{own.pool.keys.dtype}",
            pages=self._room.pages,
            most_tokens=self._room.max_tokens_per_step,
            ahead=self.drafting.ahead,
        )

    def refuse(self, request: Request) -> None:
        """Raise Refused where a request's rule cannot be kept here."""
        rule = request.speculation
        if rule is None:
            return
        if rule.kind == "kl" and self.drafting.module is None:
            raise Refused(
                f"the rule {rule} compares distributions, and the draft {NGRAM!r} has none: draft with a module, or "
                "take another rule"
            )
        if rule.kind == "judged":
            self._judge(request, rule)

    def _judge(self, request: Request, rule: Rule) -> tuple[Judge, float]:
        speaker = request.row.speaker
        judge = self.drafting.judges.get(request.digests[speaker].partition("/")[0])
        if judge is None:
            raise Refused(
                f"the rule {rule} needs a judge, and none is loaded for the speaker {speaker!r} and the draft "
                f"{self.drafting.name!r}: train one (heliostat judge), or take another rule, lossless for instance"
            )
        if rule.named:
            if rule.named not in judge.thetas:
                there = ", ".join(sorted(judge.thetas)) or "none"
                raise Refused(f"the judge has no threshold {rule.named!r}; there is: {there}")
            return judge, judge.thetas[rule.named]
        return judge, judge.theta if rule.bound is None else rule.bound

    def plan(self, decoding: Sequence[Request]) -> None:
        """Before a step is scheduled: how many tokens are to be drafted for each of those that decode."""
        self._began = self.clock()
        for request in decoding:
            request.ahead = 0
        asking = {r.id: r for r in decoding if r.speculation is not None}
        if not self.lengths.begin(len(decoding) if asking else 0):
            return
        wishes = [Wish(r.id, self.drafter.most(r, self._limit(r))) for r in asking.values()]
        counts = self.lengths.decide(wishes)
        self.drafter.prepare([(asking[name], count) for name, count in counts.items() if count])

    def _limit(self, request: Request) -> int:
        """Tokens after the next that the answer may have."""
        left = request.sampling.max_tokens - len(request.answer)
        return max(0, min(self.drafting.ahead, left - 1, self._room.max_length - request.length - 1))

    def draft(self, step: Step) -> dict[str, Drafted]:
        """The tokens of a step that are not known yet."""
        chunks = [chunk for chunk in step.chunks if chunk.ahead]
        found = self.drafter.draft(chunks) if chunks else {}
        self._drafted = self.clock()
        return found

    def judge(self, turns: Sequence[Turn], states: Sequence[Tensor]) -> None:
        """Score what is to be judged, by the states of the pass that read it."""
        if self.drafting.judges:
            judge_turns(turns, states, self._judge_of)

    def _judge_of(self, request: Request) -> tuple[Judge, float] | None:
        rule = request.speculation
        return self._judge(request, rule) if rule is not None and rule.kind == "judged" else None

    def note(self, turns: Sequence[Turn]) -> None:
        """A step has run, and every turn has said what it could."""
        self._spoken = self.clock()
        for turn in turns:
            if turn.drafted.tokens:
                ended = turn.accepted == len(turn.said)  # by a drafted end: nothing behind it was looked at
                looked = turn.accepted if ended else len(turn.drafted.tokens)
                self.lengths.taken(turn.request.id, looked, turn.accepted)

    def end(self, step: Step, turns: Sequence[Turn]) -> None:
        """All of a step is done."""
        if all(chunk.stop - chunk.start == 1 + chunk.ahead for chunk in step.chunks):
            rows, said = sum(1 + chunk.ahead for chunk in step.chunks), sum(len(turn.said) for turn in turns)
            whole, speaking = self.clock() - self._began, self._spoken - self._drafted
            self.lengths.learn(Took(whole, speaking, rows, said))

    def changed(self) -> None:
        """The engine's modules have come or gone: adapters of a model that drafts, too, perhaps."""
        if self._own is not None:
            self._own.changed()

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self.drafter.forget(request_id)
        self.lengths.forget(request_id)
