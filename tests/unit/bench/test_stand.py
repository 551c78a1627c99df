"""Random modules: separate in memory where they are said to be, common where they are not."""

import pytest
import torch

from heliostat.bench import decode
from heliostat.bench.stand import Stand
from heliostat.bench.systems import SYSTEMS
from heliostat.errors import Refused
from heliostat.linear.lora import LowRank, parts_of

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
MEMBERS = ("m1", "m2")


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    monkeypatch.setattr(decode, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr("heliostat.bench.stand.SHAPES", {"tiny": TINY})
    return Stand("tiny", dtype=torch.float32)


def test_whole_models_of_members_share_no_memory_and_differ(stand: Stand) -> None:
    modules = stand.modules(SYSTEMS["independent"], MEMBERS)
    one, other = (modules[f"{m}.whole"].model for m in MEMBERS)
    mine = {p.untyped_storage().data_ptr() for p in one.parameters()}
    assert not mine & {p.untyped_storage().data_ptr() for p in other.parameters()}
    first, second = (m.blocks[0].self_attn.q_proj.weight for m in (one, other))
    assert not torch.equal(first, second)


def test_adapters_are_separate_on_one_base_and_not_zero(stand: Stand) -> None:
    modules = stand.modules(SYSTEMS["icarus"], MEMBERS)
    assert len({id(loaded.model) for loaded in modules.values()}) == 1
    one, other = (parts_of(modules["base"].model, f"{m}.query_side") for m in MEMBERS)
    assert {path.rsplit(".", 1)[1] for path in one} == {
        "q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    for path, part in one.items():
        theirs = other[path]
        assert isinstance(part, LowRank) and isinstance(theirs, LowRank)
        assert part.b.data_ptr() != theirs.b.data_ptr() and bool(part.b.any())


def test_systems_of_one_kind_have_the_same_modules_in_memory(stand: Stand) -> None:
    alone, shared = (stand.modules(SYSTEMS[name], MEMBERS) for name in ("independent", "sun"))
    assert shared["m1.whole"].model is alone["m1.whole"].model
    assert shared["base"].model is not alone["m1.whole"].model


def test_memory_is_that_of_the_weights_a_system_reads(stand: Stand) -> None:
    whole = 4 * stand.config.parameters
    assert stand.bytes(SYSTEMS["independent"], MEMBERS) == 2 * whole
    assert stand.bytes(SYSTEMS["sun"], MEMBERS) == 3 * whole
    linears = stand.config.linears
    own = 2 * 8 * sum(sum(linears[n]) for n in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    assert stand.bytes(SYSTEMS["icarus"], MEMBERS) == whole + 2 * 4 * own


def test_an_unknown_shape_is_refused_by_name(stand: Stand) -> None:
    with pytest.raises(Refused, match="no shape '7B'; there is: tiny"):
        Stand("7B")
