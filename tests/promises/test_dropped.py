"""Dropped branches: the forward pass is the same to the bit, and what is kept learns what the whole graph says."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from heliostat.build import Loaded
from heliostat.family import SHARINGS
from heliostat.linear.lora import parts_of
from heliostat.model.transformer import BOTH, Block, Branches, Tape
from heliostat.train.data import Example
from heliostat.train.objective import MemberMicro
from heliostat.train.sharing import lay_out
from tests.promises.toys import ROWS, toy_modules

EXAMPLES = [
    Example(tuple(range(3, 14)), ((6, 11),)),
    Example(tuple(range(20, 34)), ((5, 8), (10, 14))),
]
TAPES: Mapping[str, Tape] = {
    "attention of 0": (Branches(False, True), BOTH),
    "mlp of 1": (BOTH, Branches(True, False)),
    "all but one": (Branches(False, False), Branches(False, True)),
    "all": (Branches(False, False), Branches(False, False)),
}
OWN = ("a", "la")
NAMES = (*(f"{sharing}-{own}" for sharing in SHARINGS for own in OWN), "sun-columns", "icarus-columns")
ROW = pytest.mark.parametrize("name", NAMES)


def own_of(name: str) -> str:
    return next(module for module in ROWS[name].modules if module != "base")


@contextmanager
def learning(modules: dict[str, Loaded], own: str) -> Iterator[dict[str, nn.Parameter]]:
    module = modules[own]
    parts = parts_of(module.model, own) if module.adapter else {"": module.model}
    found = {f"{path}.{n}": p for path, part in parts.items() for n, p in part.named_parameters()}
    for parameter in found.values():
        parameter.requires_grad_(True)
    try:
        yield found
    finally:
        for parameter in found.values():
            parameter.grad = None
            parameter.requires_grad_(False)


def run(
    name: str, modules: dict[str, Loaded], tape: Tape | None, *, again: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the row's own module with these branches on the tape."""
    own = own_of(name)
    taped = {**modules, own: replace(modules[own], tape=tape)}
    modules[own].model.checkpointing = again
    with learning(modules, own) as parameters:
        loss = MemberMicro(lay_out(EXAMPLES, ROWS[name]), ROWS[name], taped).loss()
        if loss.requires_grad:
            loss.backward()
        grads = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    modules[own].model.checkpointing = False
    return loss.detach(), grads


def written(tape: Tape, name: str) -> Tape:
    """As a run makes it: keys and values that others read stay on the tape."""
    return tuple(replace(on, written=name.startswith("sun")) for on in tape)


def detaching(on: Branches) -> Callable[..., Tensor]:
    """A block that runs its branches on the tape and detaches them, keys and values excepted where others read them."""

    def forward(self, x, angles, attend, route, _on=BOTH, again=False):
        branch = self.self_attn(self.input_layernorm(x), angles, attend, route)
        x = x + (branch if on.attention else branch.detach())
        branch = self.mlp(self.post_attention_layernorm(x), route)
        return x + (branch if on.mlp else branch.detach())

    return forward


@ROW
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_pass_is_the_same_to_the_bit(
    name: str, dtype: torch.dtype, tiny_model: nn.Module
) -> None:
    if dtype is torch.bfloat16 and "columns" in name:
        pytest.skip(
            "columns beside a shared weight are added in another order without a gradient: see limits"
        )
    modules = toy_modules(tiny_model, dtype=dtype)  # type: ignore[arg-type]
    whole, _ = run(name, modules, None)
    for tape in TAPES.values():
        assert torch.equal(whole, run(name, modules, written(tape, name))[0])


@ROW
@pytest.mark.parametrize("tape", list(TAPES))
def test_gradients_are_those_of_the_whole_graph_with_the_branch_detached(
    name: str, tape: str, modules: dict[str, Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = run(name, modules, written(TAPES[tape], name))
    own = own_of(name)
    blocks = modules[own].model.blocks
    if modules[own].model is modules["base"].model:  # the frozen passes of the same weights drop nothing
        model = copy.deepcopy(modules[own].model)
        modules = {**modules, own: replace(modules[own], model=model)}
        blocks = model.blocks
    for block, on in zip(blocks, TAPES[tape], strict=True):
        monkeypatch.setattr(block, "forward", detaching(on).__get__(block, Block))
    _, wanted = run(name, modules, None)
    assert set(found) == set(wanted)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-5, atol=1e-6)


@ROW
def test_everything_on_the_tape_is_no_tape_at_all(name: str, modules: dict[str, Loaded]) -> None:
    plain, full = run(name, modules, None), run(name, modules, written((BOTH, BOTH), name))
    assert torch.equal(plain[0], full[0]) and set(plain[1]) == set(full[1])
    assert all(torch.equal(gradient, full[1][n]) for n, gradient in plain[1].items())


@ROW
@pytest.mark.parametrize("tape", list(TAPES))
def test_computing_again_changes_no_gradient(name: str, tape: str, modules: dict[str, Loaded]) -> None:
    kept = run(name, modules, written(TAPES[tape], name))
    again = run(name, modules, written(TAPES[tape], name), again=True)
    assert torch.equal(kept[0], again[0]) and set(kept[1]) == set(again[1])
    for parameter, gradient in kept[1].items():
        torch.testing.assert_close(again[1][parameter], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("own", OWN)
def test_a_writer_learns_through_keys_and_values_when_all_branches_are_dropped(
    own: str, modules: dict[str, Loaded]
) -> None:
    name = f"sun-{own}"
    none = run(name, modules, TAPES["all"])[1]
    _, found = run(name, modules, written(TAPES["all"], name))
    for layer in range(2):
        for part in ("k_proj", "v_proj"):
            assert any(f"layers.{layer}.self_attn.{part}" in n and g.any() for n, g in found.items())
    silent = [n for n in none if ".self_attn." in n or ".mlp." in n]
    assert not silent


def test_a_dropped_branch_keeps_nothing(modules: dict[str, Loaded]) -> None:
    sizes = []
    for tape in (None, TAPES["all"]):
        taped = {**modules, "a": replace(modules["a"], tape=tape)}
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with learning(modules, "a"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            MemberMicro(lay_out(EXAMPLES, ROWS["independent-a"]), ROWS["independent-a"], taped).loss()
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 2
