"""All blocks in one call of the kernels against the transformer's own loop: architectures, number formats, threads."""

from collections.abc import Callable
from functools import partial
from itertools import combinations

import pytest
import torch
from torch import nn

from heliostat.engine.paged import Paged, PagePool
from heliostat.errors import Refused
from heliostat.linear.choice import add_columns
from heliostat.linear.lora import Route, adapter_of, add_adapter, remove_adapter, whole
from heliostat.linear.paca import columns_of, settle
from heliostat.model.alpha import format_of
from heliostat.model.config import parse_config
from heliostat.model.transformer import Transformer
from heliostat.model.weights import assemble, state_of
from heliostat.ops import native
from heliostat.ops.native.blocks import Laid
from heliostat.ops.running import Running

pytestmark = pytest.mark.skipif(not native.built(), reason="the compiled kernels do not run here")
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 72,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
ROWS, PAGE = 21, 4
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model_of(
    kind: str,
    dtype: torch.dtype,
    attention: dict[str, object] | None = None,
    *,
    finish: Callable[[Transformer], object] = lambda model: None,
) -> Transformer:
    """``finish``: what is done to it before its Linears are joined."""
    torch.manual_seed(0)
    own = (
        {"model_type": kind}
        if attention is None
        else {"model_type": f"heliostat_{kind}", "attention": attention}
    )
    config = parse_config(SHAPE | own)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=2.0 if name.endswith("sinks") else 0.2)
    # As a checkpoint is loaded: averages stay float32.
    state = {name: tensor.to(format_of(name, dtype)) for name, tensor in state_of(model).items()}
    for name in state:
        if name.endswith("alpha_ma"):
            state[name] = torch.linspace(0.2, 0.9, 4)
    model = assemble(config, state)
    finish(model)
    model.join()
    return model


def seam_of(model: Transformer, *, laid: bool) -> Paged:
    """Two requests of 17 and 4 tokens; the second's last row only speaks, over what the row before it wrote."""
    pool = PagePool(model.config, pages=8, page_size=PAGE, dtype=model.dtype)
    pages, first = torch.tensor([3, 0, 7, 2, 5, 6]), 17
    writes = torch.arange(ROWS - 1)
    where = torch.cat((torch.arange(first), torch.arange(ROWS - 1 - first) + 5 * PAGE))
    slots = pages[where // PAGE] * PAGE + where % PAGE
    visible = torch.cat((torch.arange(1, first + 1), torch.tensor([1, 2, 3, 3])))
    starts, page_starts = torch.tensor([0, first, ROWS]), torch.tensor([0, 5])
    entries = native.Ragged(torch.arange(ROWS), visible, starts, pages, page_starts)
    filled = torch.tensor([-1, 3, 3, 0, 0, 7, 7, 2])
    everything = Laid(pool.keys, pool.values, writes, slots, entries, pool.sums, filled) if laid else None
    ask = partial(native.attend, entries=entries)
    listed = [
        (range(first), pages[:5].tolist(), visible[:first].tolist()),
        (range(first, ROWS), [6], [1, 2, 3, 3]),
    ]
    running = partial(Running.of_entries, listed, [(-1, [3, 0, 7, 2])], page_size=PAGE, device=pages.device)
    return Paged(pool, writes=writes, slots=slots, ask=ask, laid=everything, running=running)


def run(model: Transformer, *, laid: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, and the keys and sums that were written."""
    ids = torch.arange(ROWS)
    positions = torch.cat((torch.arange(17), torch.tensor([0, 1, 2, 2])))
    seam = seam_of(model, laid=laid)
    with torch.inference_mode():
        return model(ids, positions, seam), seam.pool.keys, seam.pool.sums


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_at_once_is_one_by_one(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model = model_of(kind, dtype)
    assert model.at_once is not None
    for got, want in zip(run(model, laid=True), run(model, laid=False), strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance)


KINDS: list[dict[str, object]] = [
    {"kind": "affine"},
    {"kind": "affine", "n": "fixed", "length": 64},
    {"kind": "affine", "alpha": "constant"},
    {"kind": "affine+gated"},
    {"kind": "gated"},
    {"kind": "sink"},
]


@pytest.mark.parametrize("attention", KINDS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_at_once_is_one_by_one_for_every_kind(
    attention: dict[str, object], dtype: torch.dtype, tolerance: float
) -> None:
    model = model_of("llama", dtype, attention)
    assert model.at_once is not None
    got, want = run(model, laid=True), run(model, laid=False)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=tolerance, atol=tolerance)
    assert (got[2].numel() > 0) == model.config.attention.affine
    softmax = run(model_of("llama", dtype), laid=True)
    assert (softmax[0].float() - got[0].float()).abs().max() > 0.1  # another function, so the test can fail


def test_a_number_of_threads_changes_no_bit() -> None:
    model = model_of("llama", torch.bfloat16, {"kind": "affine+gated"})
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(model, laid=True)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def adapted(
    kind: str,
    dtype: torch.dtype,
    *,
    r: int = 2,
    attention: dict[str, object] | None = None,
    finish: Callable[[Transformer], object] = lambda model: None,
) -> Transformer:
    """Two low-rank adapters on different Linears, and tuned columns."""
    model = model_of(kind, dtype, attention, finish=finish)
    for name, targets in (("one", ALL), ("two", ("q_proj", "down_proj"))):
        add_adapter(model, name, r=r if name == "one" else 2 * r, alpha=4, targets=targets)
        for part in adapter_of(model, name).values():
            nn.init.normal_(part.a, std=0.2)
            nn.init.normal_(part.b, std=0.2)
    add_columns(model, "columns", r=6, targets=ALL, seed=3)
    for columns in columns_of(model, "columns").values():
        nn.init.normal_(columns.delta, std=0.2)
    return model.to(dtype).requires_grad_(False)


@torch.inference_mode()
def worn(model: Transformer, route: Route, *, laid: bool) -> torch.Tensor:
    return model(torch.arange(ROWS), torch.arange(ROWS), seam_of(model, laid=laid), route)


MIXED: Route = ((None, 0, 3), ("columns", 3, 5), ("one", 5, 6), ("two", 6, ROWS))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("r", [3, 8, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.12)])
def test_adapters_at_once_are_the_loop(kind: str, r: int, dtype: torch.dtype, tolerance: float) -> None:
    model = adapted(kind, dtype, r=r)
    bare = worn(model, ((None, 0, ROWS),), laid=True)
    routes: list[Route] = [MIXED, *(((name, 0, ROWS),) for name in ("one", "two", "columns")), whole("one")]
    for route in routes:
        at_once, loop = (worn(model, route, laid=laid).float() for laid in (True, False))
        assert model.wardrobe(route, model._linears, dtype, rows=ROWS), "it did not go through the loop"
        torch.testing.assert_close(at_once, loop, rtol=tolerance, atol=tolerance)
        assert not torch.allclose(at_once[-1], bare[-1].float(), atol=0.05)
    assert torch.equal(worn(model, MIXED, laid=True)[:3], bare[:3]), "who wears nothing is not touched"


@pytest.mark.parametrize("attention", [{"kind": "affine+gated"}, {"kind": "sink"}])
def test_adapters_at_once_are_the_loop_in_other_kinds_of_attention(attention: dict[str, object]) -> None:
    model = adapted("llama", torch.float32, attention=attention)
    at_once, loop = (worn(model, MIXED, laid=laid) for laid in (True, False))
    assert model.wardrobe(MIXED, model._linears, torch.float32, rows=ROWS)
    torch.testing.assert_close(at_once, loop, rtol=1e-4, atol=1e-4)


def test_a_number_of_threads_changes_no_bit_of_rows_with_adapters() -> None:
    model, threads, found = adapted("llama", torch.bfloat16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(worn(model, MIXED, laid=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_adapters_that_come_go_or_change_are_as_they_are_now() -> None:
    model = adapted("llama", torch.float32)
    route: Route = (("one", 0, ROWS),)

    def same() -> torch.Tensor:
        at_once, loop = (worn(model, route, laid=laid) for laid in (True, False))
        torch.testing.assert_close(at_once, loop, rtol=1e-4, atol=1e-4)
        return at_once

    first = same()
    for part in adapter_of(model, "one").values():
        part.b.data = 2 * part.b.data  # in another place
    second = same()
    remove_adapter(model, "one")
    gone = same()
    add_adapter(model, "one", r=4, alpha=4, targets=["k_proj"])
    for part in adapter_of(model, "one").values():
        nn.init.normal_(part.b)
    model.requires_grad_(False)
    found = [first, second, gone, same()]
    assert not any(torch.allclose(one, two) for one, two in combinations(found, 2))
    assert torch.equal(gone, worn(model, ((None, 0, ROWS),), laid=True))


def test_what_the_kernels_cannot_read_goes_through_the_loop() -> None:
    model = adapted("llama", torch.bfloat16)
    for part in adapter_of(model, "one").values():
        part.float()
    assert model.wardrobe((("one", 0, 2),), model._linears, torch.bfloat16, rows=2) is None
    assert torch.equal(*(worn(model, (("one", 0, ROWS),), laid=laid) for laid in (True, False)))
    assert model.wardrobe((("columns", 0, None),), model._linears, torch.bfloat16, rows=2)
    settle(model, "columns")
    assert model.wardrobe((("columns", 0, None),), model._linears, torch.bfloat16, rows=2) is None
    with pytest.raises(Refused, match="lift them first"):
        worn(model, MIXED, laid=True)
