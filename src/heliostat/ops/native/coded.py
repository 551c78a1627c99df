"""The compiled product with a weight in codebooks: its loader, and the weight laid out as it reads it.

HELIOSTAT_NATIVE=0 switches it off with the other kernels, HELIOSTAT_NATIVE_CODEBOOK=FILE takes another build of it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from copy import copy
from functools import cache

import torch
from torch import Tensor

from heliostat.ops import native
from heliostat.ops.codebook import Coded
from heliostat.ops.codebook_format import STRIP
from heliostat.ops.native.compiling import CODEBOOK

VECTORS = 16
"""Vectors of a row that share a table's step, at most: more would make it coarser."""
MOST_COLUMNS = 128
"""Bytes that are added up in 16 bits, as numbers with a sign."""
SECTIONS = 8
"""Parts of a row, at most, that are added up on their own; so many threads share a weight without doing a table twice."""


class _Coded(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "books", "words", "scales")),
        ("longest", ctypes.c_float),
        *(
            (name, ctypes.c_int64)
            for name in ("outputs", "inputs", "m", "v", "columns", "group", "chunk", "section")
        ),
    ]


@cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("HELIOSTAT_NATIVE") == "0":
        return None
    library = native.opened(os.environ.get("HELIOSTAT_NATIVE_CODEBOOK") or str(CODEBOOK))
    if library is None or not library.runs_here():
        return None
    where, count = ctypes.c_void_p, ctypes.c_int64
    for function in (library.coded_linear_f32, library.coded_linear_bf16):
        function.argtypes, function.restype = [where, where, count, where, where, count, count, count], None
    return library


def built() -> bool:
    """Whether the kernel runs in this process."""
    return _library() is not None


def look_up(dtype: torch.dtype) -> int:
    """Where the function is that multiplies pieces of a product, for the compiled pass over all blocks."""
    library = _library()
    assert library is not None
    function = library.coded_pieces_bf16 if dtype == torch.bfloat16 else library.coded_pieces_f32
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


def fits(coded: Coded) -> bool:
    """Whether there is a layout of this weight for the kernel."""
    half = coded.scales.dtype == coded.codebooks.dtype == torch.float16
    return half and coded.codes.device.type == "cpu" and coded.codes.numel() > 0


class Packed:
    """A weight [M, K] laid out for the kernel: codes of 64 rows side by side, column after column."""

    def __init__(self, coded: Coded) -> None:
        """Copies; ``coded`` must fit."""
        assert fits(coded)
        (outputs, segments, m), v = coded.codes.shape, coded.format.v
        columns, strips = segments * m, -(-outputs // STRIP)
        books = coded.codebooks.float()
        longest = float(books.norm(dim=-1).max())
        group = (segments if coded.format.g is None else coded.format.g // v) * m
        chunk = min(group, min(VECTORS, MOST_COLUMNS // m) * m)
        starts = [
            n for first in range(0, columns, group) for n in range(first, min(first + group, columns), chunk)
        ]
        self._books = books.transpose(1, 2).contiguous()  # [m, v, 256]
        self._words = _in_pairs(self._books / (longest or 1.0))
        self._codes = _stripped(coded.codes.reshape(outputs, columns), strips, starts)
        self._scales = torch.zeros(coded.scales.shape[1], strips * STRIP, dtype=torch.float16)
        self._scales[:, :outputs] = coded.scales.T
        section = -(-len(starts) // SECTIONS)
        self.room = -(-len(starts) // section) * strips * STRIP
        """Floats that a product wants for each row of x."""
        self.outputs, self.inputs = outputs, coded.inputs
        self._facts = (longest, outputs, coded.inputs, m, v, columns, group, chunk, section)
        self._lay()

    def _lay(self) -> None:
        at = (part.data_ptr() for part in (self._codes, self._books, self._words, self._scales))
        self._laid = _Coded(*at, *self._facts)

    @property
    def at(self) -> int:
        """The address of what the kernel reads."""
        return ctypes.addressof(self._laid)

    def again(self) -> Packed:
        """The same weight at another place in memory."""
        other = copy(self)
        other._codes, other._scales = self._codes.clone(), self._scales.clone()
        other._lay()
        return other

    @property
    def bytes(self) -> int:
        """What a product reads."""
        parts = (self._codes, self._books, self._words, self._scales)
        return sum(part.numel() * part.element_size() for part in parts)

    def product(self, x: Tensor, bias: Tensor | None = None, *, planes: int = 2) -> Tensor:
        """x [T, K] (float32 or bfloat16) by the weight -> [T, M], plus bias [M] of x's dtype.

        ``planes``: bytes of a table's numbers. One rounds to about 1 % of the product, two to about 0.02 %.
        """
        assert x.dim() == 2 and x.shape[1] == self.inputs and planes in (1, 2), (x.shape, planes)
        assert bias is None or (bias.dtype == x.dtype and bias.shape == (self.outputs,))
        x = x if x.stride(1) == 1 else x.contiguous()
        out = x.new_empty(x.shape[0], self.outputs)
        if x.shape[0] == 0:
            return out
        library = _library()
        assert library is not None
        run = library.coded_linear_bf16 if x.dtype == torch.bfloat16 else library.coded_linear_f32
        at = None if bias is None else bias.data_ptr()
        laid = ctypes.byref(self._laid)
        run(laid, x.data_ptr(), x.stride(0), at, out.data_ptr(), self.outputs, x.shape[0], planes)
        return out


def _in_pairs(books: Tensor) -> Tensor:
    """Codebooks [m, v, 256] whose longest entry has length one -> [m, pairs of v, 256, 2] in 16 bits."""
    padded = torch.nn.functional.pad(books, (0, 0, 0, books.shape[1] % 2))
    words = (padded * 32767).round().to(torch.int16)
    return words.unflatten(1, (-1, 2)).transpose(2, 3).contiguous()


def _stripped(codes: Tensor, strips: int, starts: Sequence[int]) -> Tensor:
    """Codes [M, columns] -> for each chunk [strips, its columns, 64]; rows so that they end in order, as ``finish`` says."""
    whole = codes.new_zeros(strips * STRIP, codes.shape[1])
    whole[: codes.shape[0]] = codes
    rows = torch.arange(STRIP).view(
        2, 2, 4, 4
    )  # even or odd place, of the first or the second 8, which 16, which of 4
    places = rows.permute(2, 1, 3, 0).flatten()
    lain = whole.view(strips, STRIP, -1)[:, places].transpose(1, 2)  # [strips, columns, 64]
    ends = [*starts[1:], codes.shape[1]]
    return torch.cat([lain[:, begin:end].flatten() for begin, end in zip(starts, ends, strict=True)])
