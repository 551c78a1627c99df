"""Weights in codebooks (CodeGEMM, arXiv 2512.17970): the tensors, and the plain twin that dequantizes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from heliostat.errors import Refused
from heliostat.ops.codebook_format import Format


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A weight [M, K] as it lies on disk. Refused where the tensors are not what ``format`` makes of such a weight."""

    format: Format
    inputs: int  # K
    codes: Tensor  # [M, K / v, m] uint8
    codebooks: Tensor  # [m, 256, v], numbers of 16 bits
    scales: Tensor  # [M, K / g], numbers of 16 bits

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8:
            raise Refused(
                f"codes must be uint8, they are {self.codes.dtype}: a code is the number of an entry"
            )
        for name, shape in self.format.shapes(self.outputs, self.inputs).items():
            own = getattr(self, name)
            if tuple(own.shape) != shape:
                raise Refused(
                    f"{name} are {tuple(own.shape)}; {self.format} of a weight of {self.outputs} by {self.inputs} "
                    f"has {shape}"
                )
            if name != "codes" and not own.is_floating_point():
                raise Refused(f"{name} must be numbers with a point, they are {own.dtype}")

    @property
    def outputs(self) -> int:
        """M."""
        return self.codes.shape[0]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [M, K] that the codes stand for, computed in float32. Gradients reach codebooks and scales."""
        return dequantized(self.codes, self.codebooks, self.scales, inputs=self.inputs, g=self.format.g).to(
            dtype
        )


def dequantized(codes: Tensor, codebooks: Tensor, scales: Tensor, *, inputs: int, g: int | None) -> Tensor:
    """codes [M, S, m], codebooks [m, 256, v], scales [M, groups] -> the weight [M, inputs] in float32."""
    vectors = sum(
        functional.embedding(codes[..., book].int(), codebooks[book].float())
        for book in range(codes.shape[-1])
    )
    assert isinstance(vectors, Tensor)
    rows = vectors.flatten(1)  # [M, S * v]
    if g is None:
        return rows[:, :inputs] * scales.float()
    return rows[:, :inputs] * scales.float().repeat_interleave(g, dim=1)[:, :inputs]


def plain_codebook_linear(x: Tensor, coded: Coded, bias: Tensor | None = None) -> Tensor:
    """x [..., K] by the weight -> [..., M], plus bias [M]; what the kernels are held to.

    The weight is a constant: gradients go through it to x, and it is made anew for them instead of being kept.
    """
    y: Tensor = _Constant.apply(x, coded)
    return y if bias is None else y + bias


class _Constant(torch.autograd.Function):
    """The product on the tape; nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, coded: Coded) -> Tensor:
        ctx.coded = coded
        return functional.linear(x, coded.dense(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.coded.dense(grad.dtype), None
