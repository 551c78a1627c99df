"""Linears of one input as one product: their weights lie end to end in memory, and stay views of it.

Where one of them is in codebooks there is nothing to lay end to end: then they run one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heliostat.linear.codebook import CodebookLinear
from heliostat.linear.lora import AdaptedLinear, Route, plain_linear
from heliostat.ops.linear import linear
from heliostat.ops.native.blocks import Piece


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

    def pieces(self, parent: nn.Module, dtype: torch.dtype, *, looked_up: bool) -> list[Piece]:
        """For all blocks in one call; ``looked_up``: of those in codebooks the codes, else their dense copies."""
        if self.weight is not None:
            return [Piece(self.weight.detach(), None if self.bias is None else self.bias.detach())]
        inner = [plain_linear(getattr(parent, name)) for name in self.names]
        coded = [part for part in inner if isinstance(part, CodebookLinear)]
        if not looked_up and len(coded) == len(inner):
            return [self._dense(coded, dtype)]
        return [piece_of(part, dtype, looked_up=looked_up) for part in inner]

    def _dense(self, inner: Sequence[CodebookLinear], dtype: torch.dtype) -> Piece:
        """Their dense copies end to end; each keeps its part of them as its own."""
        weight = torch.cat([part.coded.dense(dtype) for part in inner])
        for part, own in zip(inner, weight.split(self.sizes), strict=True):
            part.product.keep(own)
        if all(part.bias is None for part in inner):
            return Piece(weight)
        biases = [weight.new_zeros(p.out_features) if p.bias is None else p.bias.detach() for p in inner]
        return Piece(weight, torch.cat(biases))

    def _product(self, parent: nn.Module, x: Tensor) -> Tensor:
        if self.weight is not None:
            return linear(x, self.weight, self.bias)
        return torch.cat([plain_linear(getattr(parent, name))(x) for name in self.names], dim=-1)


def piece_of(part: nn.Linear, dtype: torch.dtype, *, looked_up: bool) -> Piece:
    """One Linear for all blocks in one call."""
    bias = None if part.bias is None else part.bias.detach()
    if not isinstance(part, CodebookLinear):
        return Piece(part.weight.detach(), bias)
    return Piece(part.product.packed if looked_up else part.product.dense(dtype), bias)


def _bias(part: nn.Linear) -> Tensor:
    return part.weight.new_zeros(part.out_features) if part.bias is None else part.bias.data
