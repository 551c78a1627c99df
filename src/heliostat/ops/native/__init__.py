"""The compiled CPU kernels, where there are any: every function here has a twin in torch that its caller falls back to.

``ready(tensor)`` says whether they serve for a tensor. HELIOSTAT_NATIVE=0 switches them off, HELIOSTAT_NATIVE=FILE
takes another build of them.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from heliostat.errors import Refused
from heliostat.ops.native.compiling import LIBRARY

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_POINTER, _COUNT, _NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "linear": [_POINTER, _COUNT] + [_POINTER] * 4 + [_COUNT] * 3,
    "rms_norm": [_POINTER] * 3 + [_COUNT] * 2 + [_NUMBER],
    "rotate": [_POINTER, _COUNT, _POINTER, _POINTER] + [_COUNT] * 3,
    "gated": [_POINTER] * 2 + [_COUNT] * 2,
    "write_pages": [_POINTER] * 2 + [_COUNT] * 2 + [_POINTER] * 2 + [_COUNT] + [_POINTER] * 2 + [_COUNT],
    "attend": [_POINTER, _COUNT] + [_POINTER] * 4 + [_COUNT] * 4 + [_NUMBER, _POINTER],
    "blocks": [_POINTER],
    "mix_forward": [_POINTER] * 4,
    "mix_backward": [_POINTER] * 8,
    "best": [_POINTER, _COUNT, _COUNT, _POINTER, _POINTER],
}

WIDEST_HEAD = 256
"""Numbers of a head that the attention kernel has room for."""


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they are not built, not wanted, or not for this processor."""
    path = os.environ.get("HELIOSTAT_NATIVE") or str(LIBRARY)
    library = opened(path) if path != "0" else None
    if library is None:
        return None
    for name, arguments in _ARGUMENTS.items():
        for suffix in _SUFFIX.values():
            try:
                function = getattr(library, f"{name}_{suffix}")
            except AttributeError as error:
                raise Refused(
                    f"{path} was built from other sources than these: build it again (make native), or set "
                    "HELIOSTAT_NATIVE=0 to go without"
                ) from error
            function.argtypes, function.restype = arguments, None
    return library


def opened(path: str) -> ctypes.CDLL | None:
    """A library of kernels, on torch's threads; None where it is not built, or not for this processor."""
    if not Path(path).is_file() or not getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return None
    try:
        for openmp in _loaded_openmp():
            ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(path)
    except OSError:
        return None


def _loaded_openmp() -> list[str]:
    """The OpenMP libraries in this process: torch's, whose threads are to be ours."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return sorted(p for p in paths if Path(p).name.startswith(("libgomp", "libiomp", "libomp")))


def built() -> bool:
    """Whether the kernels run in this process."""
    return _library() is not None


def ready(x: Tensor) -> bool:
    """Whether the kernels serve for tensors like this one, with no gradient wanted."""
    return x.dtype in _SUFFIX and x.device.type == "cpu" and not torch.is_grad_enabled() and built()


def taped(x: Tensor) -> bool:
    """Whether ``mix`` and ``mix_slopes`` serve for heads like these [B, T, H, D]; they know their own gradients."""
    return x.dtype in _SUFFIX and x.device.type == "cpu" and x.shape[-1] <= WIDEST_HEAD and built()


def attends(keys: Tensor) -> bool:
    """Whether ``attend`` serves for pages like these [P, S, K, D]."""
    return ready(keys) and keys.shape[-1] <= WIDEST_HEAD


def _call(name: str, like: Tensor, *arguments: object) -> None:
    getattr(_library(), f"{name}_{_SUFFIX[like.dtype]}")(*arguments)


def run_blocks(like: Tensor, blocks: ctypes.Structure) -> None:
    """All blocks of a transformer, as ``heliostat.ops.native.blocks`` lays them out."""
    _call("blocks", like, ctypes.byref(blocks))


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """x [T, I] (rows contiguous) by weight [O, I] -> [T, O], plus bias [O] and residual [T, O]; for few rows."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    _call(
        "linear",
        x,
        _at(x),
        x.stride(0),
        _at(weight),
        _at(bias),
        _at(residual),
        _at(out),
        *out.shape,
        x.shape[1],
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., E] contiguous, normed over the last dimension and scaled."""
    out = torch.empty_like(x)
    _call("rms_norm", x, _at(x), _at(weight), _at(out), x.numel() // x.shape[-1], x.shape[-1], eps)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate heads x [T, H, D] in place by angles [T, 1, D]; each row of x is contiguous."""
    _call("rotate", x, _at(x), x.stride(0), _at(cos), _at(sin), *x.shape)


def gated(x: Tensor) -> Tensor:
    """silu(gate) * up for x [T, 2F], gate first -> [T, F]."""
    out = x.new_empty(x.shape[0], x.shape[1] // 2)
    _call("gated", x, _at(x), _at(out), *out.shape)
    return out


def write_pages(k: Tensor, v: Tensor, rows: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Rows [W] of k and v [T, K, D] (rows contiguous) into slots [W] of pages [P, S, K, D]."""
    strides, (_, heads, width) = (k.stride(0), v.stride(0)), k.shape
    lists = (_at(rows), _at(slots), rows.numel(), _at(keys), _at(values))
    _call("write_pages", k, _at(k), _at(v), *strides, *lists, heads * width)


class Entries(ctypes.Structure):
    """``Ragged`` as the kernels read it."""

    _fields_ = [
        *((name, _POINTER) for name in ("rows", "visible", "starts", "pages", "page_starts")),
        ("count", _COUNT),
    ]


@dataclass(frozen=True, slots=True)
class Ragged:
    """Entries of a pass laid end to end, int64. Entry e: rows and visible [starts[e], starts[e + 1]), its pages
    from page_starts[e] on. Every row's entry has a page for each position that the row sees.
    """

    rows: Tensor  # [N] row of each query
    visible: Tensor  # [N] positions [0, visible) that it sees
    starts: Tensor  # [entries + 1]
    pages: Tensor  # [M] page numbers
    page_starts: Tensor  # [entries]

    def laid(self) -> Entries:
        """Good for as long as the tensors are."""
        lists = (self.rows, self.visible, self.starts, self.pages, self.page_starts)
        return Entries(*map(_at, lists), self.page_starts.numel())


def attend(q: Tensor, keys: Tensor, values: Tensor, entries: Ragged, sinks: Tensor | None = None) -> Tensor:
    """q [T, H, D] (rows contiguous) over pages [P, S, K, D] -> [T, H, D]; ``sinks`` [H] in q's number format."""
    out = q.new_empty(q.shape)
    _, slots, kv_heads, width = keys.shape
    assert width <= WIDEST_HEAD, width  # the kernel's buffers end there
    where = (_at(q), q.stride(0), _at(keys), _at(values), _at(out), ctypes.byref(entries.laid()))
    _call("attend", q, *where, q.shape[1], kv_heads, width, slots, width**-0.5, _at(sinks))
    return out


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row [N, V] (contiguous): where its highest number stands, the first of equals, and whether all are finite."""
    tokens = torch.empty(logits.shape[0], dtype=torch.long)
    finite = torch.empty(logits.shape[0], dtype=torch.bool)
    _call("best", logits, _at(logits), *logits.shape, _at(tokens), _at(finite))
    return tokens, finite


class Taped(ctypes.Structure):
    """What mixing reads in both directions, as the kernels do."""

    _fields_ = [
        *((name, _COUNT) for name in ("batch", "length", "heads", "kv_heads", "width")),
        ("alpha", _POINTER),
        ("alpha_stride", _COUNT),
        *((name, _POINTER) for name in ("average", "gates", "documents")),
        ("fixed", _COUNT),
    ]


def mixing_rows(
    shape: tuple[int, ...],
    kv_heads: int,
    alpha: Tensor,
    average: Tensor,
    gates: Tensor | None,
    documents: Tensor | None,
    fixed: int | None,
) -> Taped:
    """Heads of ``shape`` [B, T, H, D]; alpha [B, T, H] (rows alike or one behind the other), average [H] and gates [B, T, H]
    float32, documents [B, T] int64. Good for as long as the tensors are.
    """
    batch, length, heads, width = shape
    assert width <= WIDEST_HEAD, width  # the kernel's buffers end there
    sizes = (batch, length, heads, kv_heads, width)
    return Taped(*sizes, _at(alpha), alpha.stride(1), _at(average), _at(gates), _at(documents), fixed or 0)


def mix(rows: Taped, said: Tensor, v: Tensor) -> Tensor:
    """``said`` [B, T, H, D] with what v [B, T, K, D] adds to it; both contiguous, of one format."""
    out = torch.empty_like(said)
    _call("mix_forward", said, ctypes.byref(rows), _at(said), _at(v), _at(out))
    return out


def mix_slopes(
    rows: Taped, said: Tensor, v: Tensor, slope: Tensor, *, gated: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients for said, v, alpha [B, T, H] and gates [B, T, H] (float32, both), from that of what ``mix`` made."""
    to_said, to_v = torch.empty_like(said), torch.empty_like(v)
    to_alpha = torch.empty(said.shape[:3])
    to_gates = torch.empty(said.shape[:3]) if gated else None
    given = (_at(said), _at(v), _at(slope))
    _call(
        "mix_backward",
        said,
        ctypes.byref(rows),
        *given,
        _at(to_said),
        _at(to_v),
        _at(to_alpha),
        _at(to_gates),
    )
    return to_said, to_v, to_alpha, to_gates
