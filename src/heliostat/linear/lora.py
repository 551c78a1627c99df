"""Adapters as a way to be a Linear: several of them on one weight, chosen row by row in one pass; low-rank ones.

The other kind are tuned columns (``linear.columns``). The format on disk is PEFT's (``adapter_config.json``,
``adapter_model.safetensors``); see ``linear.adapter``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from heliostat.errors import Refused
from heliostat.linear.columns import Columns
from heliostat.ops.linear import linear

# Which adapter acts on which rows of the first dimension: (adapter or None, start, stop); None: all rows, none.
Route = Sequence[tuple[str | None, int, int | None]]


def whole(adapter: str | None) -> Route:
    """The route of a pass in which every row wears the same adapter."""
    return ((adapter, 0, None),)


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

    def through(self, inner: nn.Module, x: Tensor) -> Tensor:
        """The adapted Linear: x [..., in] -> [..., out]."""
        return inner(x) + self(x)


Part = LowRank | Columns
"""What an adapter is on one Linear."""


class AdaptedLinear(nn.Module):
    """A frozen Linear with named adapters beside it; a row without a route is the Linear alone.

    Called without any route at all, as models that know none do, it wears the adapter called ``worn``.
    """

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.adapters = nn.ModuleDict()
        self.worn: str | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen Linear's weight [out, in]; tuned columns stand in it where they are resident."""
        return self.inner.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen Linear's bias [out]."""
        return self.inner.bias

    def part(self, name: str | None) -> Part | None:
        """The adapter of that name; None where it does not sit here."""
        key = _key(name) if name is not None else ""
        if key not in self.adapters:
            return None
        part = self.adapters[key]
        assert isinstance(part, LowRank | Columns)
        return part

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        """[..., in] -> [..., out]; ``route`` speaks of x's first dimension."""
        if route is None:
            route = whole(self.worn)
        if len(route) == 1 and route[0][1:] == (0, None):
            part = self.part(route[0][0])
            self._refuse_others(part)
            return self.inner(x) if part is None else part.through(self.inner, x)
        self.make_ready()
        return self.adapted(self.inner(x), x, route)

    def make_ready(self) -> None:
        """Before the frozen Linear is multiplied by: columns that stand in its weight are as they were tuned last."""
        if (resident := self._resident()) is not None:
            resident.refresh(self.inner)

    def adapted(self, y: Tensor, x: Tensor, route: Route | None) -> Tensor:
        """What the adapters make of y [..., out], the Linear's product with x [..., in]; y may be changed."""
        for adapter, start, stop in route or ():
            part = self.part(adapter)
            self._refuse_others(part)
            if part is None or part is self._resident():
                continue
            if start == 0 and stop is None:
                return y + part(x)
            y[start:stop] += part(x[start:stop])
        return y

    def _resident(self) -> Columns | None:
        """The adapter whose columns stand in the weight."""
        return next((p for p in self.adapters.values() if isinstance(p, Columns) and p.resident), None)

    def _refuse_others(self, part: Part | None) -> None:
        """While columns are resident, the weight is theirs alone."""
        resident = self._resident()
        if resident is not None and resident is not part:
            raise Refused(
                "tuned columns stand in this weight, so nothing else can run on it: lift them first"
            )


class Linear(nn.Linear):
    """torch's Linear that accepts a route and has no use for it: every row gets the same weight."""

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)


def like_weight(part: nn.Module) -> Tensor:
    """An empty tensor where a Linear's weight lies, in its number format; of one without dense weight float32."""
    own = dict(part.named_parameters(recurse=False))
    if "weight" in own:
        return own["weight"].new_empty(0)
    return next(part.buffers(recurse=False)).new_empty(0, dtype=torch.float32)


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
    """Put one fresh low-rank adapter on the Linear at ``path``; the Linear is wrapped the first time."""
    inner = adapted_at(model, path).inner
    part = LowRank(inner.in_features, inner.out_features, r=r, scale=scale)
    put_part(model, path, name, part)
    return part


def put_part(model: nn.Module, path: str, name: str, part: Part) -> None:
    """Put an adapter's part on the Linear at ``path``, in place of one of that name: the weight is first as it was."""
    module = adapted_at(model, path)
    if isinstance(old := module.part(name), Columns):
        old.lift(module.inner)
    module.adapters[_key(name)] = part.to(like_weight(module.inner).device)
    changed(model)


def changed(model: nn.Module) -> None:
    """Adapters were put on or taken off: what was gathered of them is forgotten."""
    if (wardrobe := getattr(model, "wardrobe", None)) is not None:
        wardrobe.forget()


def adapted_at(model: nn.Module, path: str) -> AdaptedLinear:
    """The Linear at ``path``, wrapped so that it can take adapters."""
    module = model.get_submodule(path)
    if isinstance(module, AdaptedLinear):
        return module
    assert isinstance(module, nn.Linear), f"{path} is no Linear"
    parent, _, leaf = path.rpartition(".")
    wrapped = AdaptedLinear(module)
    setattr(model.get_submodule(parent), leaf, wrapped)
    return wrapped


def adapted_linears(model: nn.Module, name: str | None = None) -> dict[str, AdaptedLinear]:
    """The Linears that can take adapters, or those that wear the one called ``name``; by path, sorted."""
    found = {p: m for p, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    return {p: found[p] for p in sorted(found) if name is None or found[p].part(name) is not None}


def parts_of(model: nn.Module, name: str) -> dict[str, Part]:
    """The parts of one adapter, by the path of the Linear they sit on, sorted."""
    return {path: part for path, m in adapted_linears(model, name).items() if (part := m.part(name))}


def adapter_of(model: nn.Module, name: str) -> dict[str, LowRank]:
    """The parts of one low-rank adapter, by the path of the Linear they sit on, sorted."""
    return {path: part for path, part in parts_of(model, name).items() if isinstance(part, LowRank)}


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off every Linear that it sits on, so that its memory can go; resident columns are lifted."""
    for module in adapted_linears(model, name).values():
        part = module.part(name)
        if isinstance(part, Columns):
            part.lift(module.inner)
        del module.adapters[_key(name)]
    changed(model)


def _key(name: str) -> str:
    # nn.ModuleDict takes no dots in its keys, and module names of a family have them.
    return name.replace(".", "/")
