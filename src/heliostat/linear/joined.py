"""Linears of one input as one product: their weights lie end to end in memory, and stay views of it.

Where one of them is in codebooks there is nothing to lay end to end: then they run one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heliostat.linear.codebook import CodebookLinear
from heliostat.linear.lora import AdaptedLinear, Route, plain_linear
from heliostat.ops.linear import linear


class Joined:
    """The named children of a module, run as one Linear; adapters on them, put on before or after, are run too.

    It does not hold the module: in a circle, weights that are unloaded would wait for the garbage collector.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...]) -> None:
        """Moves the children's weights into one tensor [sum of out, in], of which each keeps its part."""
        self.names = names
        inner = [plain_linear(getattr(parent, name)) for name in names]
        self.sizes = [part.out_features for part in inner]
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if any(isinstance(part, CodebookLinear) for part in inner):
            return
        self.weight = torch.cat([part.weight.data for part in inner])
        if any(part.bias is not None for part in inner):
            self.bias = torch.cat([_bias(part) for part in inner])
        for part, own in zip(inner, self.weight.split(self.sizes), strict=True):
            part.weight.data = own

    def __call__(self, parent: nn.Module, x: Tensor, route: Route | None) -> Tensor:
        """x [..., in] -> [..., sum of out]; ``parent`` is the module whose children were joined."""
        for name in self.names:
            if isinstance(part := getattr(parent, name), AdaptedLinear):
                part.make_ready()
        y, start = self._product(parent, x), 0
        for name, size in zip(self.names, self.sizes, strict=True):
            part, own = getattr(parent, name), slice(start, start := start + size)
            if route is not None and isinstance(part, AdaptedLinear):
                y[..., own] = part.adapted(y[..., own], x, route)
        return y

    def plain(self, parent: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight [sum of out, in] and bias as plain tensors: its own, or a copy in ``dtype`` of what codebooks stand for."""
        if self.weight is not None:
            return self.weight, self.bias
        inner = [plain_linear(getattr(parent, name)) for name in self.names]
        weight = torch.cat([part.weight.detach().to(dtype) for part in inner])
        if all(part.bias is None for part in inner):
            return weight, None
        biases = [weight.new_zeros(p.out_features) if p.bias is None else p.bias.detach() for p in inner]
        return weight, torch.cat(biases)

    def _product(self, parent: nn.Module, x: Tensor) -> Tensor:
        if self.weight is not None:
            return linear(x, self.weight, self.bias)
        return torch.cat([plain_linear(getattr(parent, name))(x) for name in self.names], dim=-1)


def _bias(part: nn.Linear) -> Tensor:
    return part.weight.new_zeros(part.out_features) if part.bias is None else part.bias.data
