"""Low-rank adapters as a way to be a Linear: several of them on one weight, chosen row by row in one pass.

The format on disk is PEFT's (``adapter_config.json``, ``adapter_model.safetensors``); see ``linear.adapter``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from heliostat.ops.linear import linear

# Which adapter acts on which rows of the first dimension: (adapter or None, start, stop); None: all rows, none.
Route = Sequence[tuple[str | None, int, int | None]]


def whole(adapter: str | None) -> Route:
    """The route of a pass in which every row wears the same adapter."""
    return ((adapter, 0, None),)


def bare(route: Route | None) -> bool:
    """Whether no row wears an adapter."""
    return route is None or all(adapter is None for adapter, _, _ in route)


class LowRank(nn.Module):
    """One adapter: x -> scale * B A x, with A [r, in] random and B [out, r] zero at the start (LoRA, arXiv 2106.09685)."""

    def __init__(self, inputs: int, outputs: int, *, r: int, scale: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(r, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, r))
        self.scale = scale
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's dtype."""
        return (
            nn.functional.linear(nn.functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale
        )


class AdaptedLinear(nn.Module):
    """A frozen Linear with named adapters beside it; a row without a route is the Linear alone."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.adapters = nn.ModuleDict()

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        """[..., in] -> [..., out]; ``route`` speaks of x's first dimension."""
        return self.adapted(self.inner(x), x, route)

    def adapted(self, y: Tensor, x: Tensor, route: Route | None) -> Tensor:
        """What the adapters make of y [..., out], the Linear's product with x [..., in]; y may be changed."""
        for adapter, start, stop in route or ():
            if adapter is None or _key(adapter) not in self.adapters:
                continue
            delta = self.adapters[_key(adapter)]
            if start == 0 and stop is None:
                return y + delta(x)
            y[start:stop] += delta(x[start:stop])
        return y


class Linear(nn.Linear):
    """torch's Linear that accepts a route and has no use for it: every row gets the same weight."""

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)


def plain_linear(part: nn.Module) -> nn.Linear:
    """The Linear itself, with or without adapters beside it."""
    inner = part.inner if isinstance(part, AdaptedLinear) else part
    assert isinstance(inner, nn.Linear)
    return inner


def add_adapter(model: nn.Module, name: str, *, r: int, alpha: float, targets: Iterable[str]) -> list[str]:
    """Put a fresh adapter on every Linear whose last name is in ``targets``; returns their full names, sorted."""
    wanted, found = set(targets), []
    for path, module in list(model.named_modules()):
        if path.rsplit(".", 1)[-1] in wanted and isinstance(module, (nn.Linear, AdaptedLinear)):
            put_adapter(model, path, name, r=r, scale=alpha / r)
            found.append(path)
    return sorted(found)


def put_adapter(model: nn.Module, path: str, name: str, *, r: int, scale: float) -> LowRank:
    """Put one fresh adapter on the Linear at ``path``; the Linear is wrapped the first time."""
    module = model.get_submodule(path)
    if not isinstance(module, AdaptedLinear):
        assert isinstance(module, nn.Linear), f"{path} is no Linear"
        parent, _, leaf = path.rpartition(".")
        wrapped = AdaptedLinear(module)
        setattr(model.get_submodule(parent), leaf, wrapped)
        module = wrapped
    weight = module.inner.weight
    adapter = LowRank(weight.shape[1], weight.shape[0], r=r, scale=scale).to(weight.device)
    module.adapters[_key(name)] = adapter
    return adapter


def adapter_of(model: nn.Module, name: str) -> dict[str, LowRank]:
    """The parts of one adapter, by the path of the Linear they sit on, sorted."""
    found = {
        path: module.adapters[_key(name)]
        for path, module in model.named_modules()
        if isinstance(module, AdaptedLinear) and _key(name) in module.adapters
    }
    return dict(sorted(found.items()))


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off every Linear that it sits on, so that its memory can go."""
    for module in model.modules():
        if isinstance(module, AdaptedLinear) and _key(name) in module.adapters:
            del module.adapters[_key(name)]


def _key(name: str) -> str:
    # nn.ModuleDict takes no dots in its keys, and module names of a family have them.
    return name.replace(".", "/")
