"""Products with a weight in codebooks where no gradient is wanted: the kernel for few rows, a kept dense copy for more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heliostat.ops import decoding, native
from heliostat.ops.codebook import Coded
from heliostat.ops.codebook_format import STRIP, Format
from heliostat.ops.linear import linear
from heliostat.ops.native import coded as kernel
from heliostat.ops.native.blocks import Blocks, Laid, Worn

TABLE, LOOKED_UP, DENSE = 3.4, 3.1, 0.12
"""Nanoseconds of a core, by which it is judged what is faster: for each number of a table's vectors, for each 64 codes, and
for each number of a dense weight in bfloat16, whatever the rows are, up to ten of them. Measured on a Zen 4."""
GPU_ROWS = 32
"""Rows up to which the kernel for GPUs serves."""


def looking_up(format: Format, outputs: int, inputs: int) -> float:
    """Nanoseconds that the CPU kernel takes for one row and a weight [outputs, inputs]."""
    return format.segments(inputs) * format.m * (TABLE * format.v + LOOKED_UP * -(-outputs // STRIP))


def most_rows(format: Format, outputs: int, inputs: int) -> int:
    """Rows up to which the CPU kernel is the faster one for a weight [outputs, inputs], or nearly so."""
    row = looking_up(format, outputs, inputs)
    return max(1, format.v // format.m, int(DENSE * outputs * inputs / row))


class CodedProduct:
    """One weight; what it is laid out as is made when it is first asked for, and kept: ``bytes`` says how much that is."""

    def __init__(self, coded: Coded) -> None:
        self.coded = coded
        self._packed: kernel.Packed | None = None
        self._dense: Tensor | None = None

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] by the weight -> [..., M], plus bias [M]; in x's dtype, summed in float32."""
        if not self._looks_up(x, bias):
            return linear(x, self.dense(x.dtype), bias)
        rows = x.reshape(-1, x.shape[-1])
        if x.device.type == "cpu":
            return self.packed.product(rows, bias).view(*x.shape[:-1], -1)
        from heliostat.ops.triton_codebook import product

        return product(rows, self.coded, bias).view(*x.shape[:-1], -1)

    def _looks_up(self, x: Tensor, bias: Tensor | None) -> bool:
        rows = x.numel() // x.shape[-1]
        if x.dtype not in (torch.float32, torch.bfloat16) or (bias is not None and bias.dtype != x.dtype):
            return False
        return 0 < rows <= self.few_rows(x.dtype)

    def few_rows(self, dtype: torch.dtype) -> int:
        """Rows of ``dtype`` up to which codes are looked up; 0: never.

        On a CPU only those of bfloat16, whose own rounding is coarser than the tables': answers in float32 are the same
        however many rows run together.
        """
        if self.coded.codes.device.type == "cpu":
            serves = dtype == torch.bfloat16 and kernel.built() and kernel.fits(self.coded)
            return most_rows(self.coded.format, self.coded.outputs, self.coded.inputs) if serves else 0
        return GPU_ROWS if decoding.has_triton() else 0

    @property
    def packed(self) -> kernel.Packed:
        """The layout that the CPU kernel reads."""
        self._packed = self._packed or kernel.Packed(self.coded)
        return self._packed

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [M, K] in that number format."""
        if self._dense is None or self._dense.dtype != dtype:
            self._dense = self.coded.dense(dtype)
        return self._dense

    def keep(self, dense: Tensor) -> None:
        """Its dense weight lies there already, maybe beside others."""
        self._dense = dense

    @property
    def bytes(self) -> dict[str, int]:
        """What is kept beside the codes themselves."""
        dense = 0 if self._dense is None else self._dense.numel() * self._dense.element_size()
        return {"packed": self._packed.bytes if self._packed else 0, "dense": dense}


def rows_looked_up(products: Sequence[CodedProduct], dtype: torch.dtype) -> int:
    """Rows of ``dtype`` up to which all of them together are faster than their dense copies on a CPU; 0: never."""
    if not all(product.few_rows(dtype) for product in products):
        return 0
    own = [(p.coded.format, p.coded.outputs, p.coded.inputs) for p in products]
    return int(sum(DENSE * m * k for _, m, k in own) / sum(looking_up(*one) for one in own))


class ByRows:
    """All blocks in one call, in two ways: few rows look codes up, more read dense copies, made when they first come."""

    def __init__(self, rows: int, *, looked_up: Callable[[], Blocks], dense: Callable[[], Blocks]) -> None:
        """``rows``: up to how many codes are looked up."""
        self._rows, self._make = rows, (looked_up, dense)
        self._made: list[Blocks | None] = [None, None]

    def serves(self, x: Tensor, laid: Laid) -> bool:
        """As ``Blocks`` does."""
        return (
            native.attends(laid.keys)
            and x.dtype == laid.keys.dtype
            and self.made_for(x.shape[0]).serves(x, laid)
        )

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], laid: Laid, worn: Worn = ()) -> None:
        """As ``Blocks`` does."""
        self.made_for(x.shape[0])(x, angles, laid, worn)

    def made_for(self, rows: int) -> Blocks:
        """What runs so many rows."""
        way = int(rows > self._rows)
        made = self._made[way] = self._made[way] or self._make[way]()
        return made
