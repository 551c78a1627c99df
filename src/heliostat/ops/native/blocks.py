"""All blocks of a transformer in one call of the compiled kernels, over keys and values that lie in pages."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.ops import native
from heliostat.ops.native.coded import Packed, look_up

PARTS = ("input_norm", "q_norm", "k_norm", "post_norm", "sinks", "average")
"""What a block has beside products, in the kernel's order: norms of heads, sinks and the average of alpha (float32) where
there are."""

PRODUCTS = ("qkv", "o", "gate_up", "down")
"""The products of a block, in the kernel's order; Linears of one input are one product."""

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The Linears of a block that may wear adapters, in the kernel's order."""

JOINED = 3
"""Most Linears that have one input."""

KEPT = 64
"""Rows up to which the room of a call is kept for the next: decode steps, not prompts."""


class _Piece(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "coded", "bias")),
        ("outputs", ctypes.c_int64),
    ]


class _Pieces(ctypes.Structure):
    _fields_ = [("piece", ctypes.POINTER(_Piece)), ("count", ctypes.c_int64)]


class _Weights(ctypes.Structure):
    _fields_ = [
        *((part, ctypes.c_void_p) for part in PARTS),
        *((product, _Pieces) for product in PRODUCTS),
    ]


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
        *((name, ctypes.c_void_p) for name in ("look_up", "sums")),
    ]


@dataclass(frozen=True, slots=True)
class Piece:
    """One Linear of a product, or several of one input that lie end to end."""

    weight: Tensor | Packed  # [O, I], plain or laid out for looking codes up
    bias: Tensor | None = None  # [O]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        own = self.weight
        return (own.outputs, own.inputs) if isinstance(own, Packed) else (own.shape[0], own.shape[1])

    def laid(self) -> _Piece:
        """Good for as long as this is."""
        own, bias = self.weight, None if self.bias is None else self.bias.data_ptr()
        at = (None, own.at) if isinstance(own, Packed) else (own.data_ptr(), None)
        return _Piece(*at, bias, self.shape[0])


@dataclass(frozen=True, slots=True)
class Weights:
    """Of one block: a tensor or None for each of PARTS, pieces for each of PRODUCTS; of one number format, contiguous."""

    parts: Mapping[str, Tensor | None]
    products: Mapping[str, Sequence[Piece]]

    def __post_init__(self) -> None:
        assert self.parts.keys() == set(PARTS) and self.products.keys() == set(PRODUCTS)
        average = self.parts["average"]
        assert average is None or average.dtype == torch.float32, "averages of alpha are float32"

    def laid(self) -> _Weights:
        """Good for as long as this is."""
        at = [None if (part := self.parts[name]) is None else part.data_ptr() for name in PARTS]
        lists = [[piece.laid() for piece in self.products[name]] for name in PRODUCTS]
        return _Weights(*at, *(_Pieces((_Piece * len(own))(*own), len(own)) for own in lists))

    def shape(self, product: str) -> tuple[int, int]:
        """(O, I) of a whole product."""
        shapes = [piece.shape for piece in self.products[product]]
        return sum(outputs for outputs, _ in shapes), shapes[0][1]

    @property
    def room(self) -> int:
        """Floats for each row that looking codes up wants, in the product that wants the most."""
        each = [[own.weight for own in pieces] for pieces in self.products.values()]
        return max(sum(own.room for own in some if isinstance(own, Packed)) for some in each)


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
        weights: Sequence[Weights],
        *,
        heads: int,
        eps: float,
        extras: Extras = Extras(),
    ) -> None:
        """``weights``: of each layer, on the CPU."""
        self._weights, first = weights, weights[0]  # held, so that the addresses stay good
        self._at = (_Weights * len(weights))(*(own.laid() for own in weights))
        like = first.parts["input_norm"]
        assert like is not None
        (wide, width), inner, mlp_width = first.shape("qkv"), first.shape("o")[1], first.shape("down")[1]
        head_width = inner // heads
        gates = (extras.learned + extras.gated) * heads
        kv_heads = (wide - gates - inner) // head_width // 2
        self._sizes = (len(weights), width, heads, kv_heads, head_width, mlp_width)
        self._numbers = width + wide + inner + 3 * mlp_width
        self._room, self._eps, self._extras = like.new_empty(0), eps, extras
        self._floats = max(own.room for own in weights)
        """What looking up wants for each row."""
        self._sums = torch.empty(0)
        self._look_up = look_up(like.dtype) if self._floats else None

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
        sums = self._sums
        if sums.numel() < rows * self._floats:
            sums = torch.empty(rows * self._floats)
            if rows <= KEPT:
                self._sums = sums
        pages, slots = laid.keys.shape[1:3]
        shape = _Shape(*self._sizes, slots, pages * slots * self._sizes[3] * self._sizes[4])
        parts = (x, room, *angles, laid.keys, laid.values, laid.writes, laid.slots)
        at = [part.data_ptr() for part in parts]
        wearing = (_Worn * len(worn))(*(_Worn(dress.at, start, stop) for dress, start, stop in worn))
        adapters = (ctypes.addressof(wearing), len(worn), ranks)
        looking = (self._look_up, sums.data_ptr())
        asked = (laid.writes.numel(), laid.entries.laid(), *adapters, self._eps, self._mixing(laid), *looking)
        native.run_blocks(x, _Blocks(shape, ctypes.addressof(self._at), rows, *at, *asked))

    def _mixing(self, laid: Laid) -> _Mixing:
        own, sums, filled = self._extras, laid.sums, laid.filled
        rest = (own.length, own.learned, own.gated)
        if not own.affine:
            return _Mixing(None, 0, 0, None, 0, *rest)
        assert sums is not None and filled is not None, "attention is affine and nobody keeps its sums"
        strides = (sums.stride(1), sums.stride(0))
        return _Mixing(sums.data_ptr(), *strides, filled.data_ptr(), filled.numel() // 2, *rest)
