"""Who drafts: a look-up in the text, a module with pages of its own, or one that reads the speaker's pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor

from heliostat.build import Loaded
from heliostat.engine.batch import passes_of
from heliostat.engine.paged import PagePool
from heliostat.engine.request import Request, Sampling
from heliostat.engine.runner import Runner
from heliostat.engine.sampler import Draw, sample
from heliostat.engine.speculation.ngram import REACH, Index
from heliostat.engine.speculation.shadows import Shadows
from heliostat.engine.step import Chunk, Step


@dataclass(slots=True)
class Drafted:
    """Tokens that may come next in one answer."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    """[V] that each was chosen by, where its request's rule asks for them."""


class Draft(Protocol):
    """One way to draft. ``most`` and ``prepare`` are called before a step is scheduled, ``draft`` before it runs."""

    def most(self, request: Request, count: int) -> int:
        """How many tokens, at most ``count``, it could draft for a request that decodes."""

    def prepare(self, wanted: Sequence[tuple[Request, int]]) -> None:
        """Get ready to draft so many tokens: sets ``ahead`` of those it is ready for."""

    def draft(self, chunks: Sequence[Chunk]) -> dict[str, Drafted]:
        """As many tokens for each chunk as it has ``ahead``."""

    def forget(self, request_id: str) -> None:
        """A request has ended."""


class LookUp:
    """Drafts what followed the same tokens earlier in the text."""

    def __init__(self) -> None:
        self._texts: dict[str, Index] = {}
        self._found: dict[str, list[int]] = {}

    def most(self, request: Request, count: int) -> int:
        """All of ``count``, or nothing."""
        text = self._texts.setdefault(request.id, Index(max(0, request.length - REACH)))
        text.extend(request.token_ids(text.first + len(text.tokens), request.length))
        self._found[request.id] = text.look_up(count)
        return len(self._found[request.id])

    def prepare(self, wanted: Sequence[tuple[Request, int]]) -> None:
        """There is nothing to do."""
        for request, count in wanted:
            request.ahead = count

    def draft(self, chunks: Sequence[Chunk]) -> dict[str, Drafted]:
        """What was found."""
        return {c.request.id: Drafted(self._found[c.request.id][: c.ahead]) for c in chunks}

    def forget(self, request_id: str) -> None:
        """Its text is not needed any more."""
        self._texts.pop(request_id, None)
        self._found.pop(request_id, None)


@dataclass(slots=True)
class Speech:
    """A module that says one token after another for several requests, in one pass for each place."""

    module: Loaded
    runner: Runner
    eos: Sequence[int]
    tokens: int
    """Token ids that the speaker knows; a draft's further ones are never said."""
    note: Callable[[float], None] = lambda seconds: None
    """Told how long a pass took."""
    clock: Callable[[], float] = lambda: 0.0

    def speak(self, turns: Sequence[Turn]) -> dict[str, Drafted]:
        """What each turn asks for."""
        found = {turn.request.id: Drafted() for turn in turns}
        depth = 0
        while turns := [turn for turn in turns if turn.count > depth]:
            began = self.clock()
            logits = self._pass(turns, depth, found)
            draws = [self._draw(turn.request, found) for turn in turns]
            for turn, row, sampled in zip(turns, logits, sample(logits, draws), strict=True):
                drafted = found[turn.request.id]
                if turn.keeps_logits:
                    drafted.logits.append(row)
                drafted.tokens.append(sampled.token)
            if depth or all(turn.request.length - turn.start <= 2 for turn in turns):
                self.note(self.clock() - began)
            depth += 1
        return found

    def _pass(self, turns: Sequence[Turn], depth: int, found: Mapping[str, Drafted]) -> Tensor:
        name, chunks = self.module.name, []
        for turn in turns:
            stop = turn.request.length + depth
            start = turn.start if depth == 0 else stop - 1
            chunks.append(Chunk(turn.request, start, stop, name, name, turn.pages))
        requests, logits = self._run(chunks, {name: drafted.tokens for name, drafted in found.items()})
        rows = {request.id: row for row, request in enumerate(requests)}
        order = [rows[turn.request.id] for turn in turns]
        return logits[order, : self.tokens]

    def read(self, chunks: Sequence[Chunk]) -> None:
        """Write the keys and values of known tokens."""
        self._run(chunks, {})

    def _run(
        self, chunks: Sequence[Chunk], drafts: Mapping[str, Sequence[int]]
    ) -> tuple[list[Request], Tensor]:
        runs = {self.module.name: (self.module.weights, self.module.adapter)}
        size = self.runner.pool.keys.shape[2]
        return self.runner.run(passes_of(Step(tuple(chunks)), runs, page_size=size, drafts=drafts))

    def _draw(self, request: Request, found: Mapping[str, Drafted]) -> Draw:
        """The request's own wishes and noise: where the draft is as sure as the speaker, both say the same."""
        plain = self._plain(request.sampling)
        return Draw(plain, [*request.answer, *found[request.id].tokens], self.eos)

    def _plain(self, sampling: Sampling) -> Sampling:
        """Without log-probabilities, and without wishes for tokens that the draft does not know."""
        size = self.module.model.config.vocabulary
        known = all(token < size for token in sampling.logit_bias)
        if known and sampling.logprobs is None:
            return sampling
        bias = {token: wish for token, wish in sampling.logit_bias.items() if token < size}
        return replace(sampling, logprobs=None, logit_bias=bias)


@dataclass(frozen=True, slots=True)
class Turn:
    """So many tokens to be drafted for a request, on pages that are known up to ``start``."""

    request: Request
    pages: tuple[int, ...]
    start: int
    count: int

    @property
    def keeps_logits(self) -> bool:
        """Whether its rule asks what each token was chosen by."""
        return self.request.speculation is not None and self.request.speculation.kind == "kl"


class OnItsPages:
    """A module that reads the speaker's pages, and writes where the verifying pass writes over it."""

    def __init__(self, speech: Speech) -> None:
        self.speech = speech

    def most(self, request: Request, count: int) -> int:
        """All."""
        return count

    def prepare(self, wanted: Sequence[tuple[Request, int]]) -> None:
        """There is nothing to do."""
        for request, count in wanted:
            request.ahead = count

    def draft(self, chunks: Sequence[Chunk]) -> dict[str, Drafted]:
        """One pass a token, on the pages of the chunks."""
        return self.speech.speak([Turn(c.request, c.pages, c.start, c.ahead) for c in chunks])

    def forget(self, request_id: str) -> None:
        """It keeps nothing."""


class OnOwnPages:
    """A module with its own page chain for each request: it reads every token itself."""

    def __init__(self, speech: Speech, *, digest: str, pages: int, most_tokens: int, ahead: int) -> None:
        """``most_tokens``: that it reads in one pass; ``ahead``: that it drafts at most for one request."""
        pool: PagePool = speech.runner.pool
        self.speech, self._most_tokens, self._ahead = speech, most_tokens, ahead
        config = speech.module.model.config
        self._longest = config.max_length
        self.shadows = Shadows(
            speech.module.name,
            digest,
            vocabulary=config.vocabulary,
            pages=pages,
            page_size=pool.keys.shape[2],
        )

    def most(self, request: Request, count: int) -> int:
        """As far as it can count positions."""
        return max(0, min(count, self._longest - request.length + 1))

    def prepare(self, wanted: Sequence[tuple[Request, int]]) -> None:
        """Those that it is too far behind with for one pass are read first, and drafted for in a later step."""
        room, chunks = self._most_tokens, []
        for request, count in wanted:
            shadow = self.shadows.follow(request)
            if shadow.strange:
                continue
            if shadow.behind <= max(room, self._ahead + 1):
                if self.shadows.make_room(shadow, request.length + count - 1):
                    request.ahead = count
                    room -= shadow.behind
                continue
            stop = min(request.length - 1, shadow.chain.computed + room)
            if stop > shadow.chain.computed and self.shadows.make_room(shadow, stop):
                name = self.speech.module.name
                pages = tuple(shadow.chain.pages)
                chunks.append((shadow, Chunk(request, shadow.chain.computed, stop, name, None, pages)))
                room -= stop - shadow.chain.computed
        if chunks:
            self.speech.read([chunk for _, chunk in chunks])
            for shadow, chunk in chunks:
                self.shadows.read(shadow, chunk.stop)

    def draft(self, chunks: Sequence[Chunk]) -> dict[str, Drafted]:
        """One pass a token; the first also reads what was said since the last time."""
        turns = []
        for chunk in chunks:
            shadow = self.shadows.at(chunk.request.id)
            pages, start = tuple(shadow.chain.pages), shadow.chain.computed
            turns.append(Turn(chunk.request, pages, start, chunk.ahead))
        found = self.speech.speak(turns)
        for chunk in chunks:
            shadow, last = self.shadows.at(chunk.request.id), chunk.request.length - 1
            self.shadows.read(shadow, last)
            known = chunk.request.token_ids(last, last + 1)
            self.shadows.guess(shadow, [*known, *found[chunk.request.id].tokens[:-1]])
        return found

    def forget(self, request_id: str) -> None:
        """Its pages are free, or kept for who asks the same."""
        self.shadows.forget(request_id)
