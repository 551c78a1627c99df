"""Modules that come and go while an engine runs: what is refused, what is released, what goes on."""

import copy
import dataclasses
import gc
import weakref
from pathlib import Path

import pytest
import torch

from heliostat.build import Loaded, load_modules, read_family
from heliostat.engine.engine import Engine
from heliostat.engine.request import Request, Sampling
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.linear.lora import adapter_of, add_adapter
from heliostat.model.config import read_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.model.weights import load_transformer


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.load(tiny_base)


@pytest.fixture
def model(tiny_base: Path) -> Transformer:
    return load_transformer(tiny_base, read_config(tiny_base), dtype=torch.float32)


@pytest.fixture
def engine(model: Transformer, tokenizer: Tokenizer) -> Engine:
    return Engine(
        {"base": Loaded("base", "digest", "base", model)}, tokenizer, max_length=64, pages=16, page_size=4
    )


def whole(name: str, model: Transformer, digest: str = "other") -> Loaded:
    return Loaded(name, digest, name, copy.deepcopy(model))


def request(engine: Engine, *modules: str, max_tokens: int = 4) -> Request:
    row = Row(modules[0], modules[-1], modules[-1], modules[-1])
    digests = {name: engine.digests[name] for name in row.modules}
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    return Request(f"{modules}", row=row, digests=digests, prompt=(5, 6, 7, 8, 9), sampling=sampling)


def answer(engine: Engine, *modules: str) -> list[int]:
    asked = request(engine, *modules)
    engine.add(asked)
    while asked.finish_reason is None:
        engine.step()
    return asked.answer


def state(engine: Engine) -> tuple:
    return dict(engine.digests), dict(engine._runs), {n: id(m) for n, m in engine.runner.models.items()}


def with_config(name: str, model: Transformer, **changes: object) -> Loaded:
    other = copy.copy(model)
    other.config = dataclasses.replace(model.config, **changes)  # type: ignore[arg-type]
    return Loaded(name, "d", name, other)


def test_a_loaded_module_answers_and_an_unloaded_one_is_refused(engine: Engine, model: Transformer) -> None:
    before = answer(engine, "base")
    engine.load({"a": whole("a", model)})
    assert answer(engine, "a") == answer(engine, "base", "a") == before  # equal weights
    engine.unload(["a"])
    with pytest.raises(Refused, match="module a is not loaded; loaded are base"):
        engine.unload(["a"])
    stale = Request("stale", row=Row("a", "a", "a", "a"), digests={"a": "other"}, prompt=(5,))
    with pytest.raises(Refused, match="module a is not loaded"):
        engine.add(stale)
    assert answer(engine, "base") == before


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"layers": 3}, r"'b' has layers 3, those loaded have 2"),
        ({"kv_heads": 4}, "kv_heads 4"),
        ({"head_width": 16}, "head_width 16"),
        ({"vocabulary": 301}, "vocabulary 301"),
        ({"rope": {"rope_theta": 5.0}}, "rope"),
        ({"max_length": 63}, "runs 63 tokens exactly, and requests here may have 64"),
    ],
)
def test_what_does_not_fit_the_pool_changes_nothing(
    what: dict, message: str, engine: Engine, model: Transformer
) -> None:
    before = state(engine)
    with pytest.raises(Refused, match=message):
        engine.load({"good": whole("good", model), "b": with_config("b", model, **what)})
    assert state(engine) == before


def test_names_formats_devices_and_second_copies_are_refused(
    engine: Engine, model: Transformer, tokenizer: Tokenizer
) -> None:
    before = state(engine)
    with pytest.raises(Refused, match="already a module 'base'"):
        engine.load({"base": whole("base", model)})
    with pytest.raises(Refused, match="other weights than those loaded as 'base'"):
        engine.load({"la": Loaded("la", "d", "base", copy.deepcopy(model), "la")})
    with pytest.raises(Refused, match="is on meta, the pages are on cpu"):
        engine.load({"far": Loaded("far", "d", "far", copy.deepcopy(model).to("meta"))})
    assert state(engine) == before
    narrow = {"n": Loaded("n", "d", "n", copy.deepcopy(model).to(torch.bfloat16))}
    engine.load(narrow)  # wider pages lose nothing
    small = Engine(narrow, tokenizer, max_length=64, pages=4, page_size=4)
    with pytest.raises(Refused, match=r"torch.float32, the pages are torch.bfloat16"):
        small.load({"wide": whole("wide", model)})


def test_a_module_that_an_unfinished_request_names_stays(engine: Engine, model: Transformer) -> None:
    engine.load({"a": whole("a", model), "b": whole("b", model)})
    asked = request(engine, "a", "base")
    engine.add(asked)
    for _ in range(3):  # waiting, then running
        before = state(engine)
        with pytest.raises(Refused, match="module a is needed by unfinished requests"):
            engine.unload(["b", "a"])
        assert state(engine) == before
        engine.step()
    engine.abort(asked.id)
    engine.unload(["b", "a"])
    assert engine.table.available() == 16 and list(engine.digests) == ["base"]


def test_weights_go_with_the_last_module_on_them(engine: Engine, model: Transformer) -> None:
    copied = copy.deepcopy(model)
    for name in ("la", "lb"):
        add_adapter(copied, name, r=2, alpha=4, targets=["q_proj"])
    gone = weakref.ref(copied)
    modules = {"c": Loaded("c", "c", "c", copied)}
    modules |= {name: Loaded(name, name, "c", copied, name) for name in ("la", "lb")}
    engine.load(modules)
    answer(engine, "la", "lb")
    del modules, copied
    engine.unload(["c", "la"])
    held = gone()
    assert held is not None and not adapter_of(held, "la") and adapter_of(held, "lb")
    assert answer(engine, "lb")
    del held
    engine.unload(["lb"])
    gc.collect()
    assert gone() is None and list(engine.runner.models) == ["base"]


def test_a_request_made_before_its_module_was_loaded_anew_is_refused(
    engine: Engine, model: Transformer
) -> None:
    engine.load({"a": whole("a", model, "one")})
    early = request(engine, "a")
    engine.unload(["a"])
    engine.load({"a": whole("a", model, "two")})
    with pytest.raises(Refused, match="'a' was loaded anew"):
        engine.add(early)
    engine.add(request(engine, "a"))


def test_a_module_joins_weights_that_are_in_memory(tiny_family: Path, tokenizer: Tokenizer) -> None:
    family = read_family(tiny_family)
    engine = Engine(
        load_modules(tiny_family, family, ["base"], dtype=torch.float32),
        tokenizer,
        max_length=64,
        pages=9,
        page_size=4,
    )
    own = family.member("plan").row.speaker
    more = load_modules(tiny_family, family, [own], dtype=torch.float32, models=engine.runner.models)
    engine.load(more)
    assert more[own].model is engine.runner.models["base"]
    assert answer(engine, own)
    with pytest.raises(Refused, match="is loaded already"):
        load_modules(tiny_family, family, [own], dtype=torch.float32, models=engine.runner.models)
