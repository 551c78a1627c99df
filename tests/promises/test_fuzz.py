"""Anything may happen to an engine between two steps: its books stay right, and every answer is the one said alone."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from heliostat.build import Loaded
from heliostat.engine.engine import Engine
from heliostat.engine.request import Request, Sampling
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from tests.promises.test_serving import text
from tests.promises.toys import (
    ROWS,
    Exactness,
    Job,
    Served,
    adapt,
    make_engine,
    request_of,
    serve,
    toy_modules,
)
from tests.unit.engine.invariants import check_pages

OTHER = {"a": ("of another a", 77), "la": ("of another la", 99)}
"""Modules that are sometimes loaded with other weights under their name: digest and seed."""
MOVABLE = ("a", "b", "c", "la", "lb")
Alone = Callable[[Job, frozenset[str]], Served]


def other_module(modules: dict[str, Loaded], name: str) -> Loaded:
    """A module with other weights than the toy of that name."""
    digest, seed = OTHER[name]
    if name == "a":  # another full module's weights, under a digest of their own
        return Loaded("a", digest, "a", modules["b"].model)
    adapt(modules["base"].model, name, seed)
    return replace(modules[name], digest=digest)


@pytest.fixture(scope="module")
def alone(tiny_model: Transformer, tokenizer: Tokenizer) -> Alone:
    """The answer of an engine that has seen nothing else; for a job, and the modules that had other weights then."""
    known: dict[tuple, Served] = {}

    def answer(job: Job, changed: frozenset[str]) -> Served:
        changed &= set(job.row.modules)
        key = job.row, job.prompt, job.sampling.max_tokens, changed
        if key not in known:
            modules = toy_modules(tiny_model)
            modules |= {name: other_module(modules, name) for name in changed}
            known[key] = serve(make_engine(modules, tokenizer), [job])[0]
        return known[key]

    return answer


@dataclass
class Machine:
    """An engine, all that was asked of it, and which modules it has now."""

    engine: Engine
    modules: dict[str, Loaded]
    alone: Alone
    exactness: Exactness
    changed: frozenset[str] = frozenset()
    asked: list[tuple[Request, Job, frozenset[str]]] = field(default_factory=list)

    def add(self, row: Row, prompt: tuple[int, ...], max_tokens: int, salt: str) -> None:
        sampling = Sampling(max_tokens=max_tokens, ignore_eos=True, logprobs=2)
        job = Job(row, prompt, sampling, salt)
        if set(row.modules) - set(self.engine.digests):
            never = Request("never", row=row, digests=dict.fromkeys(row.modules, ""), prompt=prompt)
            missing = sorted(set(never.needs) - set(self.engine.digests))
            told = f"module .*{missing[0]}.* is not loaded" if missing else "loaded anew"
            with pytest.raises(Refused, match=told):
                self.engine.add(never)
            return
        request, table = request_of(self.engine, job), self.engine.table
        try:
            self.engine.add(request)
        except Refused:
            assert table.pages_for(len(prompt) + max_tokens - 1) > table.pages
            return
        self.asked.append((request, job, self.changed))

    def abort(self, number: int) -> None:
        if self.asked:
            request = self.asked[number % len(self.asked)][0]
            unfinished = request.finish_reason is None
            assert self.engine.abort(request.id) == unfinished and not self.engine.abort(request.id)
            assert request.finish_reason is not None

    def unload(self, name: str) -> None:
        needed = {m for r, _, _ in self.asked if r.finish_reason is None for m in r.needs}
        if name not in self.engine.digests or name in needed:
            before = dict(self.engine.digests)
            with pytest.raises(Refused):
                self.engine.unload([name])
            assert self.engine.digests == before
            return
        self.engine.unload([name])
        self.changed -= {name}

    def load(self, name: str, *, other: bool) -> None:
        if name in self.engine.digests:
            with pytest.raises(Refused, match="already a module"):
                self.engine.load({name: self.modules[name]})
            return
        module = self.modules[name]
        if other and name in OTHER:
            module = other_module(self.modules, name)
            self.changed |= {name}
        elif module.adapter is not None:  # unloading took it off
            adapt(module.model, name, {"la": 11, "lb": 12}[name])
        self.engine.load({name: module})

    def check(self) -> None:
        engine = self.engine
        check_pages(engine.scheduler, [request for request, _, _ in self.asked])
        unfinished = {request.id for request, _, _ in self.asked if request.finish_reason is None}
        assert set(engine._spoken) == unfinished and engine.unfinished == len(unfinished)
        assert set(engine.runner.models) == {weights for weights, _ in engine._runs.values()}

    def drain(self) -> None:
        left = 3000
        while self.engine.unfinished:
            self.engine.step()
            self.check()
            left -= 1
            assert left, "it does not come to an end"
        assert not any(self.engine.table._references)
        assert self.engine.table.available() == self.engine.table.pages
        for request, job, changed in self.asked:
            want, got = self.alone(job, changed), tuple(request.answer)
            assert request.finish_reason == "abort" or len(got) == job.sampling.max_tokens
            self.exactness.same(got, want.ids[: len(got)], want.gaps[: len(got)], what=f"{job}")


# Few prompts with beginnings in common, so that pages meet and references are soon known.
PROMPT = st.builds(
    lambda kept, tail: text(13, seed=7)[:kept] + text(1 + tail, seed=tail),
    st.sampled_from([0, 9, 13]),
    st.integers(0, 1),
)
ADD = st.tuples(
    st.sampled_from(sorted(ROWS)),
    PROMPT,
    st.sampled_from([1, 5, 14, 14]),
    st.sampled_from(["", "", "t"]),
)
CROWD = st.tuples(st.just("crowd"), st.lists(ADD, min_size=1, max_size=5))
STEPS = st.tuples(st.just("steps"), st.integers(1, 12))
OTHERS = st.one_of(
    st.tuples(st.just("abort"), st.integers(0, 20)),
    st.tuples(st.just("unload"), st.sampled_from(MOVABLE)),
    st.tuples(st.just("load"), st.sampled_from(MOVABLE), st.booleans()),
    st.tuples(st.just("roll"), st.sampled_from(sorted(OTHER))),
)


def happen(machine: Machine, what: tuple) -> None:
    kind, *rest = what
    if kind == "crowd":
        for row, *other in rest[0]:
            machine.add(ROWS[row], *other)
    elif kind == "steps":
        for _ in range(rest[0]):
            machine.engine.step()
            machine.check()
    elif kind == "roll":  # other weights under the same name, or the first again
        now = rest[0] in machine.changed
        machine.unload(rest[0])
        machine.load(rest[0], other=not now)
    elif kind == "load":
        machine.load(rest[0], other=rest[1])
    else:
        getattr(machine, kind)(*rest)
    machine.check()


ONE, TEN = (196,), (64, 240, 217, 84, 68, 97, 96, 68, 217, 196)
# A page lost and made again while the pages behind it, found by way of its twin, stayed.
TWIN = [
    ("crowd", [("base-speaks", ONE, 1, ""), ("base-speaks", ONE, 1, "")]),
    ("crowd", [("base-speaks", ONE, 1, "")]),
    ("crowd", [("base-speaks", ONE, 5, "")]),
    ("steps", 1),
    ("abort", 0),
    ("steps", 1),
    ("crowd", [("base-speaks", ONE, 5, ""), ("base-speaks", ONE, 14, "")]),
    (
        "crowd",
        [("base-speaks", ONE, 1, "")] * 2
        + [("icarus-a", TEN, 14, ""), ("base-speaks", ONE, 14, ""), ("icarus-a", TEN, 14, "")],
    ),
]
# A prompt of one token of which its writer writes nothing: that module may go.
UNUSED = [("crowd", [("base-speaks", ONE, 1, ""), ("three-mixed", ONE, 1, "")]), ("roll", "la")]


@settings(max_examples=40, deadline=None)
@example(pages=7, running=2, budget=6, events=TWIN)
@example(pages=7, running=2, budget=6, events=UNUSED)
@given(
    pages=st.one_of(st.integers(7, 9), st.integers(8, 40)),
    running=st.integers(2, 6),
    budget=st.integers(6, 40),
    events=st.lists(st.one_of(CROWD, CROWD, STEPS, STEPS, OTHERS), min_size=8, max_size=30),
)
def test_whatever_happens_between_steps(
    pages: int,
    running: int,
    budget: int,
    events: list[tuple],
    alone: Alone,
    tiny_model: Transformer,
    tokenizer: Tokenizer,
) -> None:
    modules = toy_modules(tiny_model)
    engine = make_engine(modules, tokenizer, pages=pages, max_running=running, max_tokens_per_step=budget)
    machine = Machine(engine, modules, alone, Exactness())
    for what in events:
        happen(machine, what)
    machine.drain()
    event(f"preempted: {any(r.preemptions for r, _, _ in machine.asked)}")
    event(f"aborted: {any(r.finish_reason == 'abort' for r, _, _ in machine.asked)}")
    event(f"hits: {engine.table.counters.hit_tokens > 0}, evicted: {engine.table.counters.evictions > 0}")
    event(f"other weights answered: {any(set(r.row.modules) & c for r, _, c in machine.asked)}")
