"""Tuned columns against autograd on the merged weight: values, gradients, what is kept; written once a step, lifted."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from heliostat.errors import Refused
from heliostat.linear.columns import Columns, Gather
from heliostat.linear.lora import AdaptedLinear, put_adapter, put_part, remove_adapter, whole

BOUND = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.08}


def made(
    inputs: int, outputs: int, r: int, *, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[nn.Linear, Columns]:
    """A frozen Linear and columns on it, D filled by chance."""
    chance = torch.Generator().manual_seed(seed)
    inner = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    for parameter in inner.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=chance))
    part = Columns(outputs, torch.randperm(inputs, generator=chance)[:r].sort().values)
    part.delta.data = 0.5 * torch.randn(outputs, r, generator=chance)
    return inner.to(dtype), part.double() if dtype == torch.float64 else part


def merged(inner: nn.Linear, part: Columns) -> Tensor:
    """The weight with the columns in it, in float64, as a leaf."""
    weight = inner.weight.detach().double()
    return weight.index_add(1, part.columns, part.delta.detach().double()).requires_grad_()


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        got.double(), want, rtol=BOUND[dtype], atol=BOUND[dtype] * (1 + float(want.detach().abs().max()))
    )


@settings(max_examples=40, deadline=None)
@given(
    st.data(),
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from(list(BOUND)),
    st.integers(1, 3),
)
def test_values_and_gradients_are_those_of_the_merged_weight(
    data: st.DataObject,
    leading: list[int],
    inputs: int,
    outputs: int,
    bias: bool,
    resident: bool,
    dtype: torch.dtype,
    batches: int,
) -> None:
    r = data.draw(st.integers(1, inputs))
    inner, part = made(inputs, outputs, r, bias=bias, dtype=dtype)
    weight = merged(inner, part)
    if resident:
        part.settle(inner)
    chance = torch.Generator().manual_seed(1)
    for _ in range(batches):  # gradients add up
        x = torch.randn(*leading, inputs, generator=chance).to(dtype).requires_grad_()
        up = torch.randn(*leading, outputs, generator=chance).to(dtype)
        y = part.through(inner, x)
        y.backward(up)
        plain = x.detach().double().requires_grad_()
        wanted = nn.functional.linear(plain, weight, inner.bias.double() if bias else None)
        wanted.backward(up.double())
        assert y.dtype == dtype and y.shape == (*leading, outputs)
        assert x.grad is not None and plain.grad is not None
        close(y, wanted, dtype)
        close(x.grad, plain.grad, dtype)
        with torch.no_grad():
            close(part.through(inner, x), wanted, dtype)
    assert part.delta.grad is not None and weight.grad is not None
    close(part.delta.grad, weight.grad[:, part.columns], dtype)
    assert inner.weight.grad is None


def kept(run: Callable[[], Tensor], known: list[Tensor]) -> list[tuple[int, ...]]:
    """Shapes of what is kept for the backward pass, each storage once, without the ``known`` ones."""
    there = {t.untyped_storage().data_ptr() for t in known}
    found: dict[int, tuple[int, ...]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in there:
            found[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    assert out.requires_grad
    return sorted(found.values())


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_only_the_picked_inputs_are_kept(resident: bool, wanted: bool) -> None:
    inner, part = made(64, 48, 4)
    if resident:
        part.settle(inner)
    x = torch.randn(2, 7, 64, requires_grad=wanted)
    known = [inner.weight, part.delta, part.columns]
    assert kept(lambda: part.through(inner, x), known) == [(2, 7, 4)]
    part.requires_grad_(False)
    if wanted:  # a frozen adapter on the tape keeps nothing at all
        assert kept(lambda: part.through(inner, x), known) == []


def test_linears_of_one_input_gather_it_once() -> None:
    gather, columns = Gather(), torch.tensor([1, 4, 6])
    inners = [nn.Linear(8, n).requires_grad_(False) for n in (5, 3, 3)]
    parts = [Columns(inner.out_features, columns, gather) for inner in inners]
    x = torch.randn(2, 8, requires_grad=True)

    def run() -> Tensor:
        return sum(p.through(i, x).sum() for i, p in zip(inners, parts, strict=True))  # type: ignore[return-value]

    known = [t for i, p in zip(inners, parts, strict=True) for t in (i.weight, p.delta, p.columns)]
    assert kept(run, known) == [(2, 3)]
    first = gather(x, columns)
    assert gather(x, columns) is first
    with torch.no_grad():
        x.add_(1)  # another input now, though the same tensor
    assert torch.equal(gather(x, columns), x[:, columns])
    assert gather(x.clone(), columns) is not first
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gather(x, columns).dtype == torch.bfloat16


def test_no_input_is_held_by_what_was_gathered_of_it() -> None:
    gather = Gather()
    x = torch.randn(2, 8)
    gone = weakref.ref(x)
    picked = gather(x, torch.tensor([0]))
    del x
    gc.collect()
    assert gone() is None and picked.shape == (2, 1)


def test_without_a_tape_inference_mode_too_the_function_is_the_same() -> None:
    for resident in (False, True):
        inner, part = made(6, 5, 2)
        want = nn.functional.linear(torch.ones(3, 6), merged(inner, part).float(), inner.bias)
        if resident:
            part.settle(inner)
        with torch.inference_mode():
            torch.testing.assert_close(part.through(inner, torch.ones(3, 6)), want)


@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "plain"]
)
def test_resident_columns_are_written_once_an_optimizer_step(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, part = made(6, 5, 2)
    twin_inner, twin = copy.deepcopy(inner), copy.deepcopy(part)
    part.settle(inner)
    writes = []
    plain = Tensor.index_copy_

    def write(self: Tensor, *arguments: Any) -> Tensor:
        writes.append(arguments)
        return plain(self, *arguments)

    monkeypatch.setattr(Tensor, "index_copy_", write)
    optimizers = [torch.optim.AdamW([p.delta], lr=0.1, weight_decay=0.5, **options) for p in (part, twin)]
    for step in range(3):
        for micro in range(4):  # gradients are accumulated
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(10 * step + micro))
            for p, i in ((part, inner), (twin, twin_inner)):
                p.through(i, x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    part.through(inner, torch.randn(3, 6))
    assert len(writes) == 3
    torch.testing.assert_close(part.delta, twin.delta)
    torch.testing.assert_close(inner.weight, merged(twin_inner, twin).float())


def test_other_changes_are_seen_too() -> None:
    inner, part = made(6, 5, 2)
    part.settle(inner)
    state = {
        name: torch.randn_like(t) if t.is_floating_point() else t for name, t in part.state_dict().items()
    }
    part.load_state_dict(state)
    part.through(inner, torch.ones(1, 6))
    assert part.originals is not None
    torch.testing.assert_close(inner.weight[:, part.columns], part.originals + state["delta"])


def test_weight_decay_draws_the_columns_to_what_they_were() -> None:
    inner, part = made(6, 5, 2)
    before = inner.weight.clone()
    part.settle(inner)
    optimizer = torch.optim.AdamW([part.delta], lr=1.0, weight_decay=1.0)
    part.delta.grad = torch.zeros_like(part.delta)
    optimizer.step()
    part.refresh(inner)
    torch.testing.assert_close(inner.weight, before)


def test_small_steps_of_a_bfloat16_weight_are_not_lost() -> None:
    inner, part = made(6, 5, 2, dtype=torch.bfloat16)
    part.delta.data.zero_()
    part.settle(inner)
    before = inner.weight.clone()
    for _ in range(64):  # each far below what bfloat16 can tell apart
        with torch.no_grad():
            part.delta.add_(1e-3)
        part.refresh(inner)
    assert part.delta.dtype == torch.float32 and part.originals is not None
    assert torch.equal(inner.weight[:, part.columns], (part.originals + part.delta).bfloat16())
    assert not torch.equal(inner.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lifted_columns_leave_the_weight_bit_identical(dtype: torch.dtype) -> None:
    inner, part = made(9, 7, 4, dtype=dtype)
    before = inner.weight.clone()
    for _ in range(3):
        part.settle(inner)
        part.settle(inner)  # once more changes nothing
        assert part.resident and not torch.equal(inner.weight, before)
        part.lift(inner)
        assert not part.resident and torch.equal(inner.weight, before)
    part.lift(inner)
    assert torch.equal(inner.weight, before)


class Strange(nn.Module):
    """A Linear without a dense weight, as quantized ones are."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.hidden, self.bias = weight, None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.hidden.t()


def test_what_has_no_dense_weight_is_tuned_in_delta_form_and_not_written_to() -> None:
    inner, part = made(6, 5, 2, bias=False)
    strange = Strange(inner.weight)
    x = torch.randn(3, 6, requires_grad=True)
    grads: list[tuple[Tensor, Tensor, Tensor]] = []
    for each in (inner, strange):
        part.delta.grad = x.grad = None
        y = part.through(each, x)
        y.square().sum().backward()
        assert part.delta.grad is not None and x.grad is not None
        grads.append((y, part.delta.grad.clone(), x.grad.clone()))
    for fast, plain in zip(*grads, strict=True):
        torch.testing.assert_close(fast, plain)
    assert kept(lambda: part.through(strange, x), [inner.weight, part.delta, part.columns]) == [(3, 2)]
    with pytest.raises(Refused, match="Strange has no dense weight"):
        part.settle(strange)


def test_autocast_of_a_float32_weight() -> None:
    for resident in (False, True):
        inner, part = made(16, 8, 4)
        if resident:
            part.settle(inner)
        x = torch.randn(5, 16, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = part.through(inner, x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        assert part.delta.grad is not None and part.delta.grad.dtype == torch.float32
        assert x.grad is not None and x.grad.dtype == torch.float32


def test_nothing_else_runs_where_columns_are_resident() -> None:
    inner, part = made(6, 5, 2)
    model = nn.Sequential(inner)
    before = inner.weight.clone()
    put_part(model, "0", "own", part)
    put_adapter(model, "0", "other", r=2, scale=1.0)
    linear = model[0]
    assert isinstance(linear, AdaptedLinear)
    x = torch.randn(4, 6)
    want = linear(x, whole("own"))
    part.settle(inner)
    torch.testing.assert_close(linear(x, whole("own")), want)
    torch.testing.assert_close(linear(x, [("own", 0, 3), ("own", 3, 4)]), want)
    for route in (None, whole(None), whole("other"), [("own", 0, 2), (None, 2, 4)]):
        with pytest.raises(Refused, match="lift them first"):
            linear(x, route)
    remove_adapter(model, "own")
    assert torch.equal(inner.weight, before)
    linear(x)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own doing
@pytest.mark.parametrize("resident", [False, True])
def test_compiled_it_is_the_same(resident: bool) -> None:
    inner, part = made(6, 5, 2)
    if resident:
        part.settle(inner)
    model = nn.Sequential(inner)
    put_part(model, "0", "own", part)
    model[0].worn = "own"  # type: ignore[assignment]
    x = torch.randn(4, 6, requires_grad=True)
    want = model(x)
    want.sum().backward()
    assert part.delta.grad is not None and x.grad is not None
    delta, to_x = part.delta.grad.clone(), x.grad.clone()
    part.delta.grad = x.grad = None
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    got.sum().backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(part.delta.grad, delta)
    torch.testing.assert_close(x.grad, to_x)
