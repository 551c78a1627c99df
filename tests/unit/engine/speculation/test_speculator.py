"""Between scheduler and passes: an abandoned step leaves drafts whole, and a draft that was too dear is tried again."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from heliostat.build import Loaded
from heliostat.engine.engine import Engine
from heliostat.engine.request import Request, Sampling
from heliostat.engine.runner import Runner
from heliostat.engine.speculation.lengths import DRAFTING
from heliostat.engine.speculation.rule import LOSSLESS
from heliostat.engine.speculation.speculator import Drafting
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.model.config import read_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.weights import load_transformer
from tests.promises.toys import make_engine, toy_modules

ALONE = Row("a", "a", "a", "a")


@pytest.fixture(scope="module")
def modules(tiny_base: Path) -> dict[str, Loaded]:
    return toy_modules(load_transformer(tiny_base, read_config(tiny_base), dtype=torch.float32))


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.load(tiny_base)


def asked(engine: Engine, name: str, *, tokens: int = 100, stuck: bool = False) -> Request:
    sampling = Sampling(max_tokens=tokens, ignore_eos=not stuck)
    return Request(
        name,
        row=ALONE,
        digests={"a": engine.digests["a"]},
        prompt=(5, 6, 7),
        sampling=sampling,
        speculation=None if stuck or engine.speculator is None else LOSSLESS,
        matcher=Stuck() if stuck else None,
    )


class Stuck:
    """A grammar that cannot go on behind four tokens."""

    def allowed(self, answer: Sequence[int]) -> bytes:
        if len(answer) >= 4:
            raise Refused("the grammar cannot go on")
        return b"\xff" * 64


def run(engine: Engine, request: Request) -> list[int]:
    engine.add(request)
    while engine.unfinished:
        engine.step()
    return request.answer


def test_a_step_that_is_abandoned_leaves_a_draft_on_its_own_pages_whole(
    modules: dict[str, Loaded], tokenizer: Tokenizer
) -> None:
    """The draft has read tokens of a step in which another request's grammar ended all: it drafts on."""
    plain = make_engine(modules, tokenizer)
    want = run(plain, asked(plain, "good", tokens=30))
    drafting = Drafting(module=modules["a"], adaptive=False, ahead=4)
    engine = make_engine(modules, tokenizer, drafting=drafting)
    good = asked(engine, "good", tokens=30)
    engine.add(good)
    engine.add(asked(engine, "stuck", tokens=30, stuck=True))
    refused = 0
    while engine.unfinished:
        try:
            engine.step()
        except Refused:
            refused += 1
    assert refused == 1 and good.answer == want
    assert good.speculated.accepted == good.speculated.drafted > 20


class Machine:
    """A clock that moves by what passes cost, whatever they take here."""

    def __init__(self, engine: Engine, runner: Runner, *, draft: float) -> None:
        self.time, self.draft, self.passes = 0.0, draft, 0
        speculator = engine.speculator
        assert speculator is not None
        speculator.clock = lambda: self.time
        self._price(engine.runner, lambda: 1.0)
        self._price(runner, self._drafted)

    def _drafted(self) -> float:
        self.passes += 1
        return self.draft

    def _price(self, runner: Runner, price: object) -> None:
        plain = runner.run

        def dear(*arguments: object) -> object:
            self.time += price()  # type: ignore[operator]
            return plain(*arguments)  # type: ignore[arg-type]

        runner.run = dear  # type: ignore[method-assign,assignment]


def test_a_draft_on_its_own_pages_that_was_too_dear_is_tried_and_comes_back(
    modules: dict[str, Loaded], tokenizer: Tokenizer
) -> None:
    engine = make_engine(modules, tokenizer, drafting=Drafting(module=modules["a"], ahead=8))
    assert engine.speculator is not None and engine.speculator._own is not None
    machine = Machine(engine, engine.speculator._own, draft=9.0)
    for number in range(2):
        run(engine, asked(engine, f"dear {number}"))
    tried = machine.passes
    assert 0 < tried <= (1 + DRAFTING) * 8 * 2, "it is tried ever more rarely"
    machine.draft = 0.01
    for number in range(4):
        run(engine, request := asked(engine, f"cheap {number}"))
    assert request.speculated.accepted > 80


def test_an_adapter_that_drafts_is_not_taken_off(modules: dict[str, Loaded], tokenizer: Tokenizer) -> None:
    own = {name: modules[name] for name in ("base", "a", "la")}
    engine = make_engine(own, tokenizer, drafting=Drafting(module=modules["la"], adaptive=False, ahead=4))
    with pytest.raises(Refused, match="module 'la' drafts here"):
        engine.unload(["la"])
    request = asked(engine, "r")
    run(engine, request)
    assert request.speculated.drafted > 0
    engine.unload(["base"])
