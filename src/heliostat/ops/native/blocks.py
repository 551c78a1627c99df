"""All blocks of a transformer in one call of the compiled kernels, over keys and values that lie in pages."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.ops import native

PARTS = (
    "input_norm",
    "qkv",
    "qkv_bias",
    "q_norm",
    "k_norm",
    "o",
    "o_bias",
    "post_norm",
    "gate_up",
    "gate_up_bias",
    "down",
    "down_bias",
    "sinks",
    "average",
)
"""The weights of a block in the kernel's order: products of one input joined; norms of heads, biases, sinks and the
average of alpha (float32) where there are."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The Linears of a block that may wear adapters, in the kernel's order."""

JOINED = 3
"""Most Linears that have one input."""

KEPT = 64
"""Rows up to which the room of a call is kept for the next: decode steps, not prompts."""


class _Weights(ctypes.Structure):
    _fields_ = [(part, ctypes.c_void_p) for part in PARTS]


class _Part(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "columns", "b")),
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


class _Worn(ctypes.Structure):
    _fields_ = [("parts", ctypes.c_void_p), ("start", ctypes.c_int64), ("stop", ctypes.c_int64)]


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "layers",
            "width",
            "heads",
            "kv_heads",
            "head_width",
            "mlp_width",
            "slots",
            "layer_numbers",
        )
    ]


class _Mixing(ctypes.Structure):
    _fields_ = [
        ("sums", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("page_numbers", "layer_numbers")),
        ("filled", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("fills", "length", "learned", "gated")),
    ]


class _Blocks(ctypes.Structure):
    _fields_ = [
        ("shape", _Shape),
        ("weights", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "room", "cos", "sin", "keys", "values")),
        *((name, ctypes.c_void_p) for name in ("write_rows", "write_slots")),
        ("writes", ctypes.c_int64),
        ("entries", native.Entries),
        ("worn", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("adapters", "ranks")),
        ("eps", ctypes.c_float),
        ("mixing", _Mixing),
    ]


@dataclass(frozen=True, slots=True)
class Laid:
    """Where the keys and values of a pass lie, in all layers, and who writes and asks."""

    keys: Tensor  # [L, P, S, K, D]
    values: Tensor  # [L, P, S, K, D]
    writes: Tensor  # [W] rows of the pass that write, int64
    slots: Tensor  # [W] where to: page * S + place, int64
    entries: native.Ragged
    sums: Tensor | None = None  # [L, P, K, D] float32: running sums of the values, where attention needs them
    filled: Tensor | None = (
        None  # [2 M] pages that are full after the pass, each behind the page before it or -1
    )


@dataclass(frozen=True, slots=True)
class Extras:
    """What attention has beside softmax; its sinks and averages are among the weights."""

    affine: bool = False
    length: int = 0
    """N where it is fixed."""
    learned: bool = False
    """Whether alpha's logits stand behind queries, keys and values in their product: one number a head."""
    gated: bool = False
    """Whether the gates' logits do, behind those."""


@dataclass(frozen=True, slots=True)
class Added:
    """What an adapter adds to a Linear: ``scale`` times b a x, or b x[columns]."""

    a: Tensor | None  # [R, I]
    columns: Tensor | None  # [R] int64, where there is no a
    b: Tensor  # [O, R]
    scale: float = 1.0

    @property
    def tensors(self) -> list[Tensor]:
        """Those there are."""
        return [part for part in (self.a, self.columns, self.b) if part is not None]

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether the kernel can read it."""
        return all(
            part.dtype == (torch.long if part is self.columns else dtype)
            and part.is_contiguous()
            and part.device.type == "cpu"
            for part in self.tensors
        )


class Dress:
    """One adapter on all blocks of a model, as the kernel reads it."""

    def __init__(self, parts: Sequence[Added | None]) -> None:
        """``parts``: for each layer one for each of LINEARS, or None where it does not sit."""
        self._tensors = [tensor for part in parts if part is not None for tensor in part.tensors]
        self._known = self._addresses()
        self._at = (_Part * len(parts))(*(_part(part) for part in parts))
        self.at, self.rank = ctypes.addressof(self._at), max((p.b.shape[1] for p in parts if p), default=0)

    def _addresses(self) -> tuple[int, ...]:
        return tuple(map(Tensor.data_ptr, self._tensors))

    @property
    def fresh(self) -> bool:
        """Whether all of it still lies where it did."""
        return self._addresses() == self._known


def _part(part: Added | None) -> _Part:
    if part is None:
        return _Part()
    at = [None if own is None else own.data_ptr() for own in (part.a, part.columns, part.b)]
    return _Part(*at, part.b.shape[1], part.scale)


Worn = Sequence[tuple[Dress, int, int]]
"""(adapter, start, stop): which rows wear what; the others nothing."""


class Blocks:
    """The blocks of one model; its weights stay where they are. Not for two threads at once: they share its room."""

    def __init__(
        self,
        weights: Sequence[dict[str, Tensor | None]],
        *,
        heads: int,
        eps: float,
        extras: Extras = Extras(),
    ) -> None:
        """``weights``: for each layer a tensor or None for each of PARTS, all of one dtype, contiguous, on the CPU."""
        self._weights, first = weights, weights[0]  # held, so that the addresses stay good
        averages = [own["average"] for own in weights]
        assert all(one is None or one.dtype == torch.float32 for one in averages), (
            "averages of alpha are float32"
        )
        at = [[None if (part := own[name]) is None else part.data_ptr() for name in PARTS] for own in weights]
        self._at = (_Weights * len(weights))(*(_Weights(*own) for own in at))
        qkv, o, down = first["qkv"], first["o"], first["down"]
        assert qkv is not None and o is not None and down is not None
        head_width = o.shape[1] // heads
        gates = (extras.learned + extras.gated) * heads
        kv_heads = (qkv.shape[0] - gates - o.shape[1]) // head_width // 2
        self._sizes = (len(weights), qkv.shape[1], heads, kv_heads, head_width, down.shape[1])
        self._numbers = qkv.shape[1] + qkv.shape[0] + o.shape[1] + 3 * down.shape[1]
        self._room, self._eps, self._extras = qkv.new_empty(0), eps, extras

    def serves(self, x: Tensor, laid: Laid) -> bool:
        """Whether this can run: rows x [T, E] and pages of the weights' number format, no gradient wanted."""
        return native.attends(laid.keys) and x.dim() == 2 and x.dtype == laid.keys.dtype == self._room.dtype

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], laid: Laid, worn: Worn = ()) -> None:
        """x [T, E] (contiguous, changed in place) through all blocks; ``angles``: cos and sin [T, 1, D]."""
        rows, room = x.shape[0], self._room
        ranks = max((dress.rank for dress, _, _ in worn), default=0)
        if room.numel() < rows * (self._numbers + JOINED * ranks):
            room = x.new_empty(rows * (self._numbers + JOINED * ranks))
            if rows <= KEPT:
                self._room = room
        pages, slots = laid.keys.shape[1:3]
        shape = _Shape(*self._sizes, slots, pages * slots * self._sizes[3] * self._sizes[4])
        parts = (x, room, *angles, laid.keys, laid.values, laid.writes, laid.slots)
        at = [part.data_ptr() for part in parts]
        wearing = (_Worn * len(worn))(*(_Worn(dress.at, start, stop) for dress, start, stop in worn))
        adapters = (ctypes.addressof(wearing), len(worn), ranks)
        asked = (laid.writes.numel(), laid.entries.laid(), *adapters, self._eps, self._mixing(laid))
        native.run_blocks(x, _Blocks(shape, ctypes.addressof(self._at), rows, *at, *asked))

    def _mixing(self, laid: Laid) -> _Mixing:
        own, sums, filled = self._extras, laid.sums, laid.filled
        rest = (own.length, own.learned, own.gated)
        if not own.affine:
            return _Mixing(None, 0, 0, None, 0, *rest)
        assert sums is not None and filled is not None, "attention is affine and nobody keeps its sums"
        strides = (sums.stride(1), sums.stride(0))
        return _Mixing(sums.data_ptr(), *strides, filled.data_ptr(), filled.numel() // 2, *rest)


def weights_of(**parts: Tensor | None) -> dict[str, Tensor | None]:
    """The weights of one block, by PARTS; what is not named is not there."""
    unknown = parts.keys() - set(PARTS)
    assert not unknown, unknown
    return {part: None if (own := parts.get(part)) is None else own.detach() for part in PARTS}
