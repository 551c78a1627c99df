"""Attention of single rows over pages as a Triton kernel, for GPUs. Its twins: ``ops.decoding``. Needs ``triton``.

One program reads one part of one row's pages for the query heads of one key head, with a running softmax; parts are put
together by their log-sums. Without a GPU, TRITON_INTERPRET=1 runs the same kernel in numpy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
"""Positions that a program reads at a time."""
PART = 512
"""Positions of a part: small enough that a few long rows fill a GPU."""
FEWEST = 16
"""Rows and columns of the smallest product that tensor cores do."""


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]  # triton reads its arguments, not python
    q,
    keys,
    values,
    pages,
    visible,
    out,
    sums,
    scale,
    q_stride,
    pages_stride,
    kv_heads,
    parts,
    part: tl.constexpr,
    slots: tl.constexpr,
    queries: tl.constexpr,
    width: tl.constexpr,
    queries_padded: tl.constexpr,
    width_padded: tl.constexpr,
    block: tl.constexpr,
    precision: tl.constexpr,
):
    row, head, number = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = number * part
    last = tl.minimum(tl.load(visible + row), first + part)
    each, lane = tl.arange(0, queries_padded), tl.arange(0, width_padded)
    wanted = (each < queries)[:, None] & (lane < width)[None, :]
    heads = head * queries + each
    asked = tl.load(q + row * q_stride + heads[:, None] * width + lane[None, :], mask=wanted, other=0.0)
    asked = asked.to(tl.float32)
    most = tl.full([queries_padded], float("-inf"), tl.float32)
    total = tl.zeros([queries_padded], tl.float32)
    mean = tl.zeros([queries_padded, width_padded], tl.float32)
    for start in range(first, last, block):
        places = start + tl.arange(0, block)
        seen = places < last
        page = tl.load(pages + row * pages_stride + places // slots, mask=seen, other=0)
        slot = (page * slots + places % slots) * kv_heads + head
        at = slot[:, None] * width + lane[None, :]
        # What is not seen may be anything, NaN too: it is never read.
        there = seen[:, None] & (lane < width)[None, :]
        k = tl.load(keys + at, mask=there, other=0.0).to(tl.float32)
        scores = tl.dot(asked, tl.trans(k), input_precision=precision) * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        chances, fade = tl.exp(scores - higher[:, None]), tl.exp(most - higher)
        v = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
        mean = mean * fade[:, None] + tl.dot(chances, v, input_precision=precision)
        total = total * fade + tl.sum(chances, 1)
        most = higher
    whole = tl.where(total > 0, total, 1.0)
    to = (row * parts + number) * kv_heads * queries + heads
    tl.store(out + to[:, None] * width + lane[None, :], mean / whole[:, None], mask=wanted)
    tl.store(sums + to, most + tl.log(whole), mask=each < queries)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, pages: Tensor, visible: Tensor, sinks: Tensor | None = None
) -> Tensor:
    """q [T, H, D] over pages [P, S, K, D] -> [T, H, D]; row t sees positions [0, visible[t]) of pages[t] ([T, N]).

    ``sinks`` [H] go in by the log-sums: what a head says shrinks by the share that its sink has. Shapes alone decide
    what is launched, so it can be captured in a graph.
    """
    rows, heads, width = q.shape
    slots, kv_heads = keys.shape[1:3]
    q = q if q.stride()[1:] == (width, 1) else q.contiguous()
    parts = -(-pages.shape[1] * slots // PART)
    out = torch.empty(rows, parts, heads, width, dtype=torch.float32, device=q.device)
    sums = torch.empty(rows, parts, heads, dtype=torch.float32, device=q.device)
    queries = heads // kv_heads
    _kernel[(rows, kv_heads, parts)](
        q,
        keys,
        values,
        pages,
        visible,
        out,
        sums,
        width**-0.5,
        q.stride(0),
        pages.stride(0),
        kv_heads,
        parts,
        part=PART,
        slots=slots,
        queries=queries,
        width=width,
        queries_padded=max(FEWEST, triton.next_power_of_2(queries)),
        width_padded=max(FEWEST, triton.next_power_of_2(width)),
        block=BLOCK,
        # What fits bfloat16 or float16 fits tf32 as well: tensor cores round nothing of it.
        precision="ieee" if keys.dtype == torch.float32 else "tf32",
    )
    said = out[:, 0] if parts == 1 else (out * sums.softmax(1)[..., None]).sum(1)
    if sinks is not None:
        said = said * (sums.logsumexp(1) - sinks.float()).sigmoid()[..., None]
    return said.to(q.dtype)
