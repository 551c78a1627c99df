"""Drafted tokens change no answer under the lossless rule: whoever drafts, whatever else runs, however it is sampled."""

import copy
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.build import Loaded
from heliostat.clock import run_virtual
from heliostat.engine.engine import Engine
from heliostat.engine.grammar import Grammars
from heliostat.engine.graphs import as_it_is
from heliostat.engine.paged import PagePool
from heliostat.engine.request import Request, Sampling
from heliostat.engine.runner import Runner
from heliostat.engine.speculation.drafting import OnOwnPages, Speech
from heliostat.engine.speculation.rule import LOSSLESS, Rule, parse_rule
from heliostat.engine.speculation.speculator import Drafting
from heliostat.family import Row
from heliostat.model.config import read_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.weights import load_transformer
from tests.conftest import write_checkpoint
from tests.promises.crews import Listener, assert_empty, crowd, make_worker, order_of
from tests.promises.test_disaggregation import jobs_of
from tests.promises.test_quantized import low_of
from tests.promises.toys import ROWS, Exactness, Job, make_engine, serve, toy_modules
from tests.unit.engine.invariants import check_pages

DRAFTS = ("ngram", "close", "far", "twin", "same")
_numbers = itertools.count()


def nudged(module: Loaded, name: str, by: float) -> Loaded:
    """The same weights, a little moved: who mostly says the same."""
    model = copy.deepcopy(module.model)
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=chance))
    return Loaded(name, f"digest of {name}", name, model)


@pytest.fixture(scope="module")
def draftings(
    modules: dict[str, Loaded], tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Drafting]:
    """By who drafts: the text, modules of another shape or the same, near to what speaks or far from it."""
    folder = write_checkpoint(tmp_path_factory.mktemp("small"), seed=9, hidden_size=16, num_hidden_layers=1)
    small = load_transformer(folder, read_config(folder), dtype=torch.float32)
    plain = Loaded("plain", "digest of plain", "plain", copy.deepcopy(modules["a"].model))
    return {
        "ngram": Drafting(adaptive=False, ahead=4),
        "close": Drafting(module=nudged(modules["a"], "close", 0.004), adaptive=False, ahead=5),
        "far": Drafting(module=Loaded("far", "digest of far", "far", small), adaptive=False, ahead=3),
        "twin": Drafting(module=nudged(modules["a"], "twin", 0.004), reads=True, adaptive=False, ahead=4),
        "same": Drafting(module=plain, reads=True, adaptive=False, ahead=6),
    }


@dataclass
class Wish:
    """What one request asks for."""

    row: Row
    prompt: tuple[int, ...]
    sampling: Sampling
    rule: Rule | None = LOSSLESS
    schema: dict[str, Any] | None = None


@dataclass
class Heard:
    """What came of it."""

    ids: tuple[int, ...]
    text: str
    reason: str | None
    logprobs: list[float | None]
    tops: list[tuple[int, ...]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


class Asking:
    """Asks an engine, checks its pages after every step, and hears every answer."""

    def __init__(self, engine: Engine, grammars: Grammars | None = None) -> None:
        self.engine, self.grammars = engine, grammars
        self.requests: list[Request] = []
        self.heard: dict[str, Heard] = {}

    def ask(self, wish: Wish) -> Request:
        matcher = None if wish.schema is None or self.grammars is None else self.grammars.matcher(wish.schema)
        request = Request(
            f"r{next(_numbers)}",
            row=wish.row,
            digests={name: self.engine.digests[name] for name in wish.row.modules},
            prompt=wish.prompt,
            sampling=wish.sampling,
            matcher=matcher,
            speculation=wish.rule,
        )
        self.engine.add(request)
        self.requests.append(request)
        self.heard[request.id] = Heard((), "", None, [])
        return request

    def step(self) -> None:
        for piece in self.engine.step():
            heard = self.heard[piece.request.id]
            heard.text += piece.text
            if piece.sampled is not None:
                assert piece.place == len(heard.ids), "tokens are told in order, each once"
                heard.ids += (piece.sampled.token,)
                heard.logprobs.append(piece.sampled.logprob)
                best = sorted((chance for _, chance in piece.sampled.top), reverse=True)
                heard.gaps.append(best[0] - best[1] if len(best) > 1 else 1.0)
            heard.reason = piece.finish_reason
        check_pages(self.engine.scheduler, self.requests)
        check_draft(self.engine)

    def run(self) -> list[Heard]:
        while self.engine.unfinished:
            self.step()
        for request in self.requests:
            heard = self.heard[request.id]
            assert heard.reason == request.finish_reason and heard.ids == tuple(request.answer)
        return [self.heard[request.id] for request in self.requests]


def check_draft(engine: Engine) -> None:
    """The draft's own pages: held by who runs, and by nobody else."""
    assert engine.speculator is None or isinstance(engine.speculator.drafting, Drafting)
    if engine.speculator is None or not isinstance(engine.speculator.drafter, OnOwnPages):
        return
    shadows = engine.speculator.drafter.shadows
    held = sorted(page for chain in shadows.chains for page in set(chain.pages))
    assert shadows.table.available() == shadows.table.pages - len(set(held))
    assert {chain.id for chain in shadows.chains} <= {request.id for request in engine.scheduler.requests}
    for chain in shadows.chains:
        assert chain.computed <= chain.length


def wishes(count: int, *, seed: int = 0) -> list[Wish]:
    """Of all rows, with every way to sample, prompts with beginnings in common and repetitions."""
    chance = random.Random(seed)
    shared = tuple(chance.randrange(3, 250) for _ in range(9))
    ways: list[dict[str, Any]] = [
        {"ignore_eos": True, "logprobs": 2},
        {"ignore_eos": True, "temperature": 1.0, "seed": 5, "logprobs": 2},
        {"temperature": 0.7, "top_p": 0.8, "seed": 6},
        {"temperature": 1.3, "top_k": 20, "min_p": 0.02, "seed": 7, "choice": 2},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5, "ignore_eos": True},
        {"logit_bias": {7: 3.0, 9: -100.0}, "min_tokens": 5},
        {"stop": ("e", "a b", "\n"), "ignore_eos": True},
    ]
    found = []
    for number, row in zip(range(count), itertools.cycle(ROWS.values()), strict=False):
        own = tuple(chance.randrange(3, 250) for _ in range(chance.randrange(1, 6)))
        prompt = shared[: chance.randrange(10)] + own * chance.randrange(1, 4)
        sampling = Sampling(max_tokens=chance.randrange(5, 20), **ways[number % len(ways)])
        found.append(Wish(row, prompt, sampling, chance.choice([LOSSLESS, LOSSLESS, None])))
    return found


def alone(modules: dict[str, Loaded], tokenizer: Tokenizer, asked: Sequence[Wish]) -> list[Heard]:
    """The same with nothing drafted, in a batch of its own."""
    asking = Asking(make_engine(modules, tokenizer))
    for wish in asked:
        asking.ask(Wish(wish.row, wish.prompt, wish.sampling, None, wish.schema))
    return asking.run()


def same(exactness: Exactness, got: Sequence[Heard], want: Sequence[Heard]) -> None:
    for number, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        before = exactness.ties
        if len(ours.ids) == len(theirs.ids):
            exactness.same(ours.ids, theirs.ids, theirs.gaps, what=f"answer {number}")
        if exactness.ties == before:
            assert (ours.ids, ours.text, ours.reason) == (theirs.ids, theirs.text, theirs.reason)
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)


@pytest.mark.parametrize("draft", DRAFTS)
def test_answers_are_those_without_drafts(
    draft: str,
    modules: dict[str, Loaded],
    draftings: dict[str, Drafting],
    tokenizer: Tokenizer,
    exactness: Exactness,
) -> None:
    asked = wishes(42)
    asking = Asking(make_engine(modules, tokenizer, drafting=draftings[draft]))
    for wish in asked:
        asking.ask(wish)
    same(exactness, asking.run(), alone(modules, tokenizer, asked))
    told = [request.speculated for request in asking.requests]
    assert sum(each.drafted for each in told) > 0 and sum(each.judged for each in told) == 0
    if draft != "far":
        assert sum(each.accepted for each in told) > 0
    assert all(not r.speculated.drafted for r in asking.requests if r.speculation is None)
    assert asking.engine.table.available() == asking.engine.table.pages


def test_who_drafts_itself_is_always_right(
    modules: dict[str, Loaded], draftings: dict[str, Drafting], tokenizer: Tokenizer
) -> None:
    asking = Asking(make_engine(modules, tokenizer, drafting=draftings["same"]))
    request = asking.ask(Wish(Row("a", "a", "a", "a"), (5, 6, 7), Sampling(max_tokens=22, ignore_eos=True)))
    steps = 0
    while asking.engine.unfinished:
        asking.step()
        steps += 1
    assert request.speculated.drafted == request.speculated.accepted == 18
    assert steps == 1 + 3  # the prompt; then six drafted tokens and one more at a time


@pytest.mark.parametrize("draft", DRAFTS)
def test_preempted_and_aborted_answers_are_those_without_drafts(
    draft: str,
    modules: dict[str, Loaded],
    draftings: dict[str, Drafting],
    tokenizer: Tokenizer,
    exactness: Exactness,
) -> None:
    asked = wishes(16, seed=3)
    want = alone(modules, tokenizer, asked)
    asking, chance = (
        Asking(make_engine(modules, tokenizer, pages=13, drafting=draftings[draft])),
        random.Random(1),
    )
    for wish in asked:
        asking.ask(wish)
    unwanted = {r.id for r in asking.requests if chance.random() < 0.3}
    while asking.engine.unfinished:
        asking.step()
        for request in list(asking.engine.scheduler.running):
            if request.id in unwanted and len(request.answer) > 2:
                asking.engine.abort(request.id)
    kept = [n for n, request in enumerate(asking.requests) if request.finish_reason != "abort"]
    got = [asking.heard[asking.requests[n].id] for n in kept]
    same(exactness, got, [want[n] for n in kept])
    assert any(request.preemptions for request in asking.requests)
    assert asking.engine.table.available() == asking.engine.table.pages
    check_draft(asking.engine)


@pytest.mark.parametrize("draft", ["ngram", "close", "twin"])
def test_answers_by_a_schema_are_those_without_drafts(
    draft: str,
    modules: dict[str, Loaded],
    draftings: dict[str, Drafting],
    tokenizer: Tokenizer,
    exactness: Exactness,
) -> None:
    schema = {"type": "array", "items": {"enum": ["ab", "abc"]}, "minItems": 2, "maxItems": 3}
    row = Row("a", "a", "a", "a")
    asked = [
        Wish(row, (5, 6, 7), Sampling(max_tokens=40, temperature=heat, seed=seed), schema=schema)
        for heat in (0.0, 1.0)
        for seed in range(3)
    ]
    grammars = Grammars(tokenizer)
    plain = Asking(make_engine(modules, tokenizer), grammars)
    drafted = Asking(make_engine(modules, tokenizer, drafting=draftings[draft]), grammars)
    for wish in asked:
        plain.ask(Wish(wish.row, wish.prompt, wish.sampling, None, schema))
        drafted.ask(wish)
    same(exactness, drafted.run(), plain.run())
    assert any(request.finish_reason == "stop" for request in drafted.requests)


@pytest.mark.parametrize("rule", ["entropy:0.01:2", "topk:5", "kl:9"])
def test_rules_that_take_other_tokens_stay_within_the_schema(
    rule: str, modules: dict[str, Loaded], draftings: dict[str, Drafting], tokenizer: Tokenizer
) -> None:
    """What a rule only looked at, the grammar has not read."""
    text = {"type": "string", "maxLength": 30}
    schema = {
        "type": "object",
        "properties": {"a": text, "b": {"enum": ["xx", "yy"]}},
        "required": ["a", "b"],
    }
    grammars = Grammars(tokenizer)
    asking = Asking(make_engine(modules, tokenizer, drafting=draftings["close"]), grammars)
    for heat in (0.0, 1.0):
        for seed in range(6):
            sampling = Sampling(max_tokens=80, temperature=heat, seed=seed)
            asking.ask(Wish(Row("a", "a", "a", "a"), (5, 6, 7, seed), sampling, parse_rule(rule), schema))
    asking.run()
    assert sum(request.speculated.judged for request in asking.requests) > 0
    for request in asking.requests:
        fresh = grammars.matcher(schema)
        for place, token in enumerate(request.answer):
            bits = fresh.allowed(request.answer[:place])
            assert bits[token // 8] >> token % 8 & 1, (request.id, place)


@pytest.mark.parametrize("draft", ["ngram", "twin", "close"])
def test_workers_that_decode_draft_for_what_others_have_read(
    draft: str,
    modules: dict[str, Loaded],
    draftings: dict[str, Drafting],
    tokenizer: Tokenizer,
    exactness: Exactness,
) -> None:
    jobs = jobs_of({name: ROWS[name] for name in ("sun-a", "prefillshare-a", "icarus-la")}, sampled=True)
    engine = make_engine(modules, tokenizer)
    plain = serve(engine, jobs)

    async def apart() -> None:
        first = make_worker(modules, tokenizer, name="prefill")
        second = make_worker(modules, tokenizer, name="decode", credit=64, drafting=draftings[draft])
        orders = [order_of(job, engine.digests, speculation="lossless") for job in jobs]
        found = await crowd(orders, second, first)
        for ours, theirs in zip(found, plain, strict=True):
            exactness.same(ours.ids, theirs.ids, theirs.gaps)
            assert ours.failures == ()
        assert second.core.engine.speculator is not None
        assert second.core.engine.speculator.lengths.everybody.seen > 1
        await assert_empty(first, second)
        check_draft(second.core.engine)
        await first.close()
        await second.close()

    run_virtual(apart())


def test_what_was_drafted_is_told_with_the_tokens_and_goes_on_elsewhere(
    modules: dict[str, Loaded], draftings: dict[str, Drafting], tokenizer: Tokenizer
) -> None:
    wish = Sampling(max_tokens=20, ignore_eos=True, temperature=0.8, seed=3)
    job = Job(Row("a", "a", "a", "a"), (5, 6, 7), wish)

    async def on() -> None:
        worker = make_worker(modules, tokenizer, drafting=draftings["same"])
        order = order_of(job, worker.core.engine.digests, speculation="lossless")
        listener = Listener()
        assert await worker.decode(order, listener.hear) is None
        await listener.ended.wait()
        told = [said.speculated for said in listener.said if said.speculated is not None]
        assert sum(drafted for drafted, _, _ in told) == sum(taken for _, taken, _ in told) == 16
        assert [said.number for said in listener.said] == list(range(20))
        ids = tuple(said.sampled.token for said in listener.said)
        for known in (1, 7, 19):  # another worker goes on from what was heard
            later = order_of(job, worker.core.engine.digests, speculation="lossless", answer=ids[:known])
            again = Listener()
            assert await worker.decode(later, again.hear) is None
            await again.ended.wait()
            assert (*ids[:known], *(said.sampled.token for said in again.said)) == ids
        await assert_empty(worker)
        await worker.close()

    run_virtual(on())


def test_the_twin_in_codebooks_reads_the_speakers_pages(
    modules: dict[str, Loaded], tokenizer: Tokenizer, exactness: Exactness
) -> None:
    low = Loaded("low", "digest of low", "low", low_of(modules["base"].model, dense=False))
    asked = wishes(24, seed=8)
    drafting = Drafting(module=low, reads=True, adaptive=False, ahead=3)
    asking = Asking(make_engine(modules, tokenizer, drafting=drafting))
    for wish in asked:
        asking.ask(wish)
    same(exactness, asking.run(), alone(modules, tokenizer, asked))
    assert sum(request.speculated.accepted for request in asking.requests) > 0


@pytest.mark.parametrize(
    ("kind", "reads"), [("affine+gated", False), ("affine+gated", True), ("sink", False)]
)
def test_bases_of_other_attention_forget_what_was_rolled_back(
    kind: str, reads: bool, tokenizer: Tokenizer, exactness: Exactness, make_checkpoint: Callable[..., Path]
) -> None:
    """Running sums of a page that held rejected tokens are made anew."""
    folder = make_checkpoint(model_type="heliostat_llama", attention={"kind": kind})
    modules = toy_modules(load_transformer(folder, read_config(folder), dtype=torch.float32))
    asked = wishes(12, seed=4)
    draft = nudged(modules["a"], "close", 0.004)
    drafting = Drafting(module=draft, reads=reads, adaptive=False, ahead=6)
    asking = Asking(make_engine(modules, tokenizer, drafting=drafting, max_tokens_per_step=64))
    for wish in asked:
        asking.ask(wish)
    same(exactness, asking.run(), alone(modules, tokenizer, asked))
    told = [request.speculated for request in asking.requests]
    assert 0 < sum(each.accepted for each in told) < sum(each.drafted for each in told)


@pytest.mark.parametrize("draft", ["close", "twin"])
def test_long_prompts_in_small_steps_and_recorded_passes(
    draft: str,
    modules: dict[str, Loaded],
    draftings: dict[str, Drafting],
    tokenizer: Tokenizer,
    exactness: Exactness,
) -> None:
    asked = [Wish(w.row, w.prompt * 3, w.sampling) for w in wishes(10, seed=6)]
    small = {"max_tokens_per_step": 12, "max_running": 5}
    asking = Asking(make_engine(modules, tokenizer, drafting=draftings[draft], **small))
    assert asking.engine.speculator is not None
    speech = asking.engine.speculator.drafter.speech  # type: ignore[attr-defined]
    speech.runner = recorded(speech, asking.engine)
    for wish in asked:
        asking.ask(wish)
    same(exactness, asking.run(), alone(modules, tokenizer, asked))
    assert speech.runner.graphs.replays > 0
    assert sum(request.speculated.accepted for request in asking.requests) > 0


def recorded(speech: Speech, engine: Engine) -> Runner:
    """The draft's runner as on a GPU, its recording aside; where pages are the speaker's, so is the pool."""
    before = speech.runner
    shared = before.pool is engine.runner.pool
    pages, size = before.pool.keys.shape[1:3]
    if not shared:
        return Runner({speech.module.name: speech.module}, pages=pages, page_size=size, record=as_it_is)
    pool = PagePool(engine.config, pages=pages + 1, page_size=size, dtype=before.pool.keys.dtype)
    engine.runner.pool = pool
    return Runner(
        {speech.module.name: speech.module}, pages=pages, page_size=size, record=as_it_is, pool=pool
    )
