"""Products with a weight in codebooks as a Triton kernel, for GPUs. Its twin: ``ops.codebook``. Needs ``triton``.

One program computes some outputs of some rows: it gathers the entries that a tile of codes names (codebooks are small
enough for the nearest cache), scales them, and multiplies. The sum over the inputs is one program's, in one order, in
float32: nothing is added by chance. Without a GPU, TRITON_INTERPRET=1 runs the same kernel in numpy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heliostat.ops.codebook import Coded

OUTPUTS, INPUTS, FEWEST = 32, 64, 16
"""Outputs and inputs of a tile, and rows of the smallest product that tensor cores do."""


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]  # triton reads its arguments, not python
    x,
    codes,
    books,
    scales,
    bias,
    out,
    rows,
    outputs,
    segments,
    groups,
    x_stride,
    inputs: tl.constexpr,
    m: tl.constexpr,
    v: tl.constexpr,
    g: tl.constexpr,
    has_bias: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_inputs: tl.constexpr,
    precision: tl.constexpr,
):
    row = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
    output = tl.program_id(0) * tile_outputs + tl.arange(0, tile_outputs)
    total = tl.zeros([tile_rows, tile_outputs], tl.float32)
    for start in range(0, inputs, tile_inputs):
        k = start + tl.arange(0, tile_inputs)
        there = (k < inputs)[:, None] & (output < outputs)[None, :]
        weight = tl.zeros([tile_inputs, tile_outputs], tl.float32)
        for book in tl.static_range(m):
            at = (output[None, :] * segments + (k // v)[:, None]) * m + book
            code = tl.load(codes + at, mask=there, other=0).to(tl.int32)
            entry = (book * 256 + code) * v + (k % v)[:, None]
            weight += tl.load(books + entry, mask=there, other=0.0).to(tl.float32)
        scale = tl.load(scales + output[None, :] * groups + (k // g)[:, None], mask=there, other=0.0)
        own = tl.load(
            x + row[:, None] * x_stride + k[None, :],
            mask=(row < rows)[:, None] & (k < inputs)[None, :],
            other=0.0,
        )
        total += tl.dot(own.to(tl.float32), weight * scale.to(tl.float32), input_precision=precision)
    if has_bias:
        total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    place = row[:, None] * outputs + output[None, :]
    wanted = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=wanted)


def product(x: Tensor, coded: Coded, bias: Tensor | None = None) -> Tensor:
    """x [T, K] by the weight -> [T, M], plus bias [M], in x's dtype. For few rows."""
    (rows, inputs), outputs = x.shape, coded.outputs
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(rows, outputs)
    _kernel[(triton.cdiv(outputs, OUTPUTS), triton.cdiv(rows, FEWEST))](
        x,
        coded.codes,
        coded.codebooks,
        coded.scales,
        out if bias is None else bias,
        out,
        rows,
        outputs,
        coded.codes.shape[1],
        coded.scales.shape[1],
        x.stride(0),
        inputs=inputs,
        m=coded.format.m,
        v=coded.format.v,
        g=coded.format.g or inputs,
        has_bias=bias is not None,
        tile_rows=FEWEST,
        tile_outputs=OUTPUTS,
        tile_inputs=INPUTS,
        precision="ieee" if x.dtype == torch.float32 else "tf32",
    )
    return out
