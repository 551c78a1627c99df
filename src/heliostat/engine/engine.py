"""The engine of one process: schedule, run, sample, hand out text, step by step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from torch import Tensor

from heliostat.build import Loaded, take_off
from heliostat.engine.answer import Spoken
from heliostat.engine.arrivals import Arrivals
from heliostat.engine.batch import passes_of
from heliostat.engine.fitting import refuse_misfits
from heliostat.engine.ledger import Shape
from heliostat.engine.page_table import PageTable
from heliostat.engine.paged import PagePool
from heliostat.engine.prefixes import Prefixes
from heliostat.engine.request import FinishReason, Request, State
from heliostat.engine.runner import Runner
from heliostat.engine.sampler import Draw, Sampled
from heliostat.engine.scheduler import Scheduler
from heliostat.engine.speculation.drafting import Drafted
from heliostat.engine.speculation.rule import Speculated
from heliostat.engine.speculation.speculator import Drafting, Room, Speculator
from heliostat.engine.speculation.verifying import Turn, choose, turns_of
from heliostat.engine.step import Step
from heliostat.engine.store import Fetch, Store
from heliostat.errors import Refused
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.ops.best import best

PAGE_SIZE = 16
MAX_TOKENS_PER_STEP = 2048


@dataclass(frozen=True, slots=True)
class Piece:
    """A token that one step added to one answer; where drafted ones were taken there are several."""

    request: Request
    text: str
    """Certain text, possibly empty: a character or a stop string may still be open."""
    sampled: Sampled | None
    finish_reason: FinishReason | None = None
    why: str = ""
    """More about a reason that is none of the answer's own."""
    place: int = 0
    """Of the token in the answer."""
    speculated: Speculated | None = None
    """What was drafted in the step, and came of it: with the first of its tokens."""


class Engine:
    """Answers requests of any mix of rows in one batch. Not thread-safe: one owner calls add, abort and step.

    A request may end at its boundary (``hands_over``), its pages kept until ``abort``; another engine that ``fetches``
    them goes on. It is the owner's to say for how long they are kept.
    """

    def __init__(
        self,
        modules: Mapping[str, Loaded],
        tokenizer: Tokenizer,
        *,
        max_length: int,
        pages: int,
        page_size: int = PAGE_SIZE,
        max_running: int = 64,
        max_tokens_per_step: int = MAX_TOKENS_PER_STEP,
        share: tuple[str, str] | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        """``modules`` are those that the rows of requests may name; all of one shape, on one device (see ``load``).

        ``share``: name and incarnation of the memory in which its pages lie for other engines to read. ``drafting``:
        who drafts for requests that ask for it.
        """
        if not modules:
            raise Refused("an engine needs at least one module")
        longest = min(module.model.config.max_length for module in modules.values())
        if max_length > longest:
            raise Refused(f"max_length is {max_length}; the model runs {longest} tokens exactly, and no more")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.runner = Runner(modules, pages=pages, page_size=page_size, share=share)
        self.speculator: Speculator | None = None
        self.digests: dict[str, str] = {}
        """What the modules are now, by name: a request takes those of its row along."""
        self._runs: dict[str, tuple[str, str | None]] = {}
        self.config = next(iter(modules.values())).model.config
        self.load(modules)
        generations = self.store.generations if self.store is not None else None
        self.table = PageTable(pages, page_size=page_size, generations=generations)
        self.prefixes = Prefixes(page_size=page_size)
        self.scheduler = Scheduler(
            self.table,
            max_length=max_length,
            max_running=max_running,
            max_tokens_per_step=max_tokens_per_step,
            eos_ids=tokenizer.eos_ids,
        )
        if drafting is not None:
            room = Room(
                pages=pages,
                max_length=max_length,
                max_tokens_per_step=max_tokens_per_step,
                eos=tokenizer.eos_ids,
            )
            self.speculator = Speculator(drafting, self.runner, room, config=self.config)
        self._spoken: dict[str, Spoken] = {}
        self.arrivals = Arrivals(self.scheduler)
        self.latest = Step(())
        """The step that ran last."""
        self.stalled = False
        """Whether that step could do nothing: pages of handed requests are in the way."""
        self._untold: list[Piece] = []

    @property
    def store(self) -> Store | None:
        """The memory of its pages, where others can read them."""
        return self.runner.pool.store

    def load(self, modules: Mapping[str, Loaded]) -> None:
        """Take more modules in, between two steps. Those on weights that are loaded hold the same ``model``.

        Refused, and nothing is changed, where a name is taken or a module does not fit the pool: another shape,
        vocabulary or device, a wider number format, a shorter longest text.
        """
        refuse_misfits(
            modules,
            names=self._runs,
            models=self.runner.models,
            config=self.config,
            pool=self.runner.pool,
            max_length=self.max_length,
        )
        kind = str(self.runner.pool.keys.dtype)
        for name, module in modules.items():
            # The same weights in another number format write other keys and values: the format is part of the writer.
            self.digests[name] = f"{module.digest}/{kind}"
            self._runs[name] = (module.weights, module.adapter)
            self.runner.models[module.weights] = module.model
        self._changed()

    def _changed(self) -> None:
        self.runner.changed()
        if self.speculator is not None:
            self.speculator.changed()

    def unload(self, names: Collection[str]) -> None:
        """Let modules go, between two steps; weights that no other module runs on are given up, adapters taken off.

        Refused, and nothing is changed, for a name that is not loaded, that an unfinished request needs or whose adapter
        drafts. Pages they wrote stay until others need them: their keys say which weights wrote them, so none is ever wrong.
        """
        self._refuse_missing(names)
        draft = self.speculator.drafting.module if self.speculator is not None else None
        if draft is not None and draft.adapter is not None and draft.name in names:
            raise Refused(f"module {draft.name!r} drafts here: it stays as long as it does")
        needed = {name for request in self.scheduler.requests for name in request.needs}
        if busy := sorted(needed.intersection(names)):
            raise Refused(
                f"module {', '.join(busy)} is needed by unfinished requests: wait for them or abort them"
            )
        self._changed()
        for name in dict.fromkeys(names):
            weights, adapter = self._runs.pop(name)
            del self.digests[name]
            if all(weights != other for other, _ in self._runs.values()):
                del self.runner.models[weights]
            elif adapter is not None and (weights, adapter) not in self._runs.values():
                take_off(self.runner.models[weights], adapter)

    def _refuse_missing(self, names: Collection[str]) -> None:
        if missing := [name for name in names if name not in self._runs]:
            raise Refused(
                f"module {', '.join(missing)} is not loaded; loaded are {', '.join(sorted(self._runs)) or 'none'}"
            )

    @property
    def unfinished(self) -> int:
        """Requests that still wait or run, or of whose end nobody was told yet."""
        return self.scheduler.unfinished + len(self._untold)

    def hosts(self, name: str, digest: str | None) -> bool:
        """Whether a module is loaded, with these weights."""
        return digest is not None and self.digests.get(name) == digest

    def add(self, request: Request, fetch: Fetch | None = None) -> None:
        """Take a request in, with where its pages come from if it fetches. Raises Refused where it can never run here."""
        self._refuse_unfit(request)
        spoken = Spoken.begin(self.tokenizer, request.sampling.stop)
        for token in request.answer:
            spoken.push(token)
        if spoken.stopped or (request.answer and self.scheduler.reason_to_end(request) is not None):
            raise Refused(f"nothing is left to say for request {request.id!r}: its answer has ended")
        self.scheduler.add(request)
        self.stalled = False
        self.prefixes.meet(request)
        self._spoken[request.id] = spoken
        if request.fetches:
            assert fetch is not None, f"{request.id!r} fetches from nowhere"
            self.arrivals.expect(request, fetch)

    def _forget(self, request_id: str) -> None:
        self._spoken.pop(request_id, None)
        self.arrivals.forget(request_id)
        if self.speculator is not None:
            self.speculator.forget(request_id)

    def _refuse_unfit(self, request: Request) -> None:
        self._refuse_missing(request.needs)
        for name in request.needs:
            if request.digests.get(name) != self.digests[name]:
                # Its pages would be kept under the name of weights that did not write them.
                raise Refused(
                    f"module {name!r} was loaded anew since request {request.id!r} was made: make it again"
                )
        size = self.config.vocabulary
        if not all(0 <= token < size for token in request.tokens):
            raise Refused(f"the prompt holds token ids outside [0, {size})")
        if strange := [token for token in request.sampling.logit_bias if not 0 <= token < size]:
            raise Refused(f"logit_bias names token ids outside [0, {size}): {strange}")
        if self.speculator is not None:
            self.speculator.refuse(request)
        elif request.speculation is not None:
            raise Refused(
                f"nothing is drafted here, so the rule {request.speculation} has nothing to verify: start with a draft "
                "(--draft ngram, or a module's name), or leave speculation out"
            )

    def abort(self, request_id: str) -> bool:
        """End a request wherever it stands, handed over too; its pages are free at once. False if it is not here."""
        self._forget(request_id)
        self.stalled = False
        return self.scheduler.finish(request_id, "abort")

    def step(self) -> list[Piece]:
        """One step; what it added to each answer that got a token. Empty when nothing is unfinished.

        A request that ends without a token of its own in this step (handed, lost, gone) has a piece without one.
        Raises Refused where a module's logits are not finite or a grammar cannot go on: the requests it was for are
        ended, the others go on with the next step.
        """
        if not self.unfinished:
            return []
        if self.speculator is not None:
            self.speculator.plan(self.scheduler.decoding)
        self.latest = step = self.scheduler.schedule()
        before = self.arrivals.bytes
        gone = self.arrivals.bring()
        lost, self.scheduler.lost = self.scheduler.lost, []
        self._untold += [self._ended(request, why) for request, why in gone]
        self._untold += [self._ended(request) for request in (*lost, *step.handed)]
        said = self._run(step) if step.chunks else self._commit(step, [])
        told, self._untold = self._untold, []
        moved = step.chunks or step.preempted or said or told or self.arrivals.bytes > before
        self.stalled = not moved
        return said + told

    def _run(self, step: Step) -> list[Piece]:
        turns: list[Turn] = []
        try:
            drafts = self.speculator.draft(step) if self.speculator is not None else {}
            requests, logits, states = self._forward(step, drafts)
            highest, fine = (found.tolist() for found in best(logits))
            broken = dict.fromkeys(r for r, whole in zip(requests, fine, strict=True) if not whole)
            if not broken:
                turns = turns_of(requests, drafts)
                if self.speculator is not None:
                    self.speculator.judge(turns, states)
                choose(turns, logits, highest, self._draw)
        except BaseException:
            self.scheduler.abandon(step)
            raise
        if broken:
            self.scheduler.abandon(step)
            self._refuse_broken(list(broken))
        if self.speculator is None:
            return self._commit(step, turns)
        self.speculator.note(turns)
        pieces = self._commit(step, turns)
        self.speculator.end(step, turns)
        return pieces

    def _forward(
        self, step: Step, drafts: Mapping[str, Drafted]
    ) -> tuple[list[Request], Tensor, list[Tensor]]:
        """Who speaks, once for each row, by which logits, out of which states of each pass."""
        tokens = {name: drafted.tokens for name, drafted in drafts.items()}
        passes = passes_of(step, self._runs, page_size=self.table.page_size, drafts=tokens)
        states: list[Tensor] = []
        return *self.runner.run(passes, states), states

    def _commit(self, step: Step, turns: Sequence[Turn]) -> list[Piece]:
        firsts = [len(turn.request.answer) for turn in turns]
        last = {turn.request.id: turn.said[-1].token for turn in turns}
        taken = {turn.request.id: turn.ids[:-1] for turn in turns if len(turn.said) > 1}
        finished = self.scheduler.commit(step, last, taken)
        said = [p for turn, first in zip(turns, firsts, strict=True) for p in self._pieces(turn, first)]
        return said + [self._ended(request) for request in finished if request.id not in last]

    def _ended(self, request: Request, why: str = "") -> Piece:
        """A piece without a token: the request is handed over, or cannot go on here."""
        self._forget(request.id)
        reason: FinishReason = "handed" if request.state is State.HANDED else request.finish_reason or "abort"
        return Piece(request, "", None, reason, why)

    def _draw(self, request: Request, said: Sequence[int] = ()) -> Draw:
        """How a request's next token is to be chosen, behind what it ``said`` in this step."""
        answer = [*request.answer, *said] if said else request.answer
        try:
            allowed = None if request.matcher is None else request.matcher.allowed(answer)
        except Refused:
            self.abort(request.id)  # it would be stuck at every step
            raise
        return Draw(request.sampling, answer, self.tokenizer.eos_ids, allowed)

    def _refuse_broken(self, broken: Sequence[Request]) -> NoReturn:
        for request in broken:
            self.abort(request.id)
        first = broken[0]
        raise Refused(
            f"member {first.member!r} cannot answer: the logits of {first.row.speaker!r} are not finite after "
            f"{first.length} tokens ({len(broken)} requests are ended). Its weights, or those of "
            f"{', '.join(first.row.modules)}, hold or make numbers that are none: heliostat check FAMILY; "
            "in bfloat16, try --dtype float32"
        )

    def _pieces(self, turn: Turn, first: int) -> list[Piece]:
        """What a turn added to its answer, whose tokens from ``first`` on are new: one for each, until it ended."""
        request, found = turn.request, list[Piece]()
        for place, sampled in enumerate(turn.said[: len(request.answer) - first], first):
            found.append(self._piece(request, sampled, place))
            if found[-1].finish_reason is not None:
                break
        if turn.drafted.tokens and found:
            accepted = min(turn.accepted, len(found))
            told = Speculated(len(turn.drafted.tokens), accepted, min(turn.judged, accepted))
            request.speculated.add(told.drafted, told.accepted, told.judged)
            found[0] = replace(found[0], speculated=told)
        return found

    def _piece(self, request: Request, sampled: Sampled, place: int) -> Piece:
        spoken, last = self._spoken[request.id], place == len(request.answer) - 1
        ended = last and request.finish_reason == "stop"  # the end token itself is no text
        text = "" if ended else spoken.push(sampled.token)
        if spoken.stopped:
            last = True
            del request.answer[place + 1 :]  # taken in the same step, and never said
            if request.finish_reason is None:
                self.scheduler.finish(request.id, "stop")
        if not last:
            return Piece(request, text, sampled, place=place)
        if request.state is State.HANDED:
            self._forget(request.id)  # what it holds back is told by who goes on
            return Piece(request, text, sampled, "handed", place=place)
        if request.finish_reason is not None:
            text += spoken.finish()
            self._forget(request.id)
            request.finish_reason = "stop" if spoken.stopped else request.finish_reason
        return Piece(request, text, sampled, request.finish_reason, place=place)


def longest_that_fits(model: Transformer | Shape, *, cache_mib: int) -> int:
    """Tokens of the longest request whose pages ``cache_mib`` holds, at least one page's."""
    each = PagePool.bytes_per_page(model.config, page_size=PAGE_SIZE, dtype=model.dtype)
    return max(1, cache_mib * 2**20 // each) * PAGE_SIZE


def pages_that_fit(model: Transformer | Shape, *, max_length: int, max_running: int, cache_mib: int) -> int:
    """Pages for ``max_running`` requests of full length, or as many as ``cache_mib`` holds if that is fewer.

    Raises Refused, with the numbers, where not even one request of full length fits.
    """
    each = PagePool.bytes_per_page(model.config, page_size=PAGE_SIZE, dtype=model.dtype)
    one = -(-max_length // PAGE_SIZE)
    fitting = cache_mib * 2**20 // each
    if fitting < one:
        raise Refused(
            f"a request of {max_length} tokens needs {one * each / 2**20:.1f} MiB of pages, cache_mib is {cache_mib}: "
            "raise it, or lower max_length"
        )
    return min(fitting, one * max_running)
