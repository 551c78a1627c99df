"""Rows over their own pages: every body is the plain twin, whatever lies beyond what is seen.

The Triton kernel runs where triton is installed: on a GPU, or in its interpreter without one.
"""

import os

import pytest
import torch
from torch import Tensor

from heliostat.ops import decoding, native
from heliostat.ops.decoding import Body, RowPages, body_for, has_triton, plain_rows

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is first imported

BODIES = {
    "native": (decoding.native_rows, native.built()),
    "torch": (decoding.torch_rows, True),
    "triton": (decoding.triton_rows, has_triton()),
}
there = [
    pytest.param(body, id=name, marks=pytest.mark.skipif(not ready, reason=f"{name} is not here"))
    for name, (body, ready) in BODIES.items()
]


def made(
    seed: int,
    *,
    rows: int = 5,
    slots: int = 4,
    heads: int = 6,
    kv_heads: int = 2,
    width: int = 8,
    wide: int = 7,
) -> tuple[Tensor, Tensor, Tensor, RowPages]:
    """Queries, pages of keys and values, and who sees what; what nobody sees is NaN."""
    chance = torch.Generator().manual_seed(seed)
    count = rows * wide + 1
    keys, values = (torch.randn(count, slots, kv_heads, width, generator=chance) for _ in range(2))
    visible = torch.randint(1, wide * slots + 1, (rows,), generator=chance)
    visible[0], visible[-1] = 1, wide * slots
    pages = torch.randperm(count, generator=chance)[: rows * wide].view(rows, wide)
    seen = torch.zeros(count, slots, dtype=torch.bool)
    for row in range(rows):
        seen[pages[row]] |= (torch.arange(wide * slots) < visible[row]).view(wide, slots)
    keys[~seen], values[~seen] = torch.nan, torch.nan
    return torch.randn(rows, heads, width, generator=chance), keys, values, RowPages(pages, visible)


@pytest.mark.parametrize("body", there)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"rows": 1, "wide": 1},
        {"heads": 4, "kv_heads": 4, "width": 16},
        {"heads": 8, "kv_heads": 1, "width": 24},
        {"slots": 16, "wide": 5, "width": 32},
        {"slots": 16, "wide": 70, "rows": 2},  # more than one part
    ],
)
@torch.inference_mode()
def test_every_body_is_the_plain_twin(body: Body, shape: dict[str, int]) -> None:
    for seed in range(3):
        q, keys, values, rows = made(seed, **shape)
        sinks = (
            None
            if seed == 0
            else 4.0 * torch.randn(q.shape[1], generator=torch.Generator().manual_seed(seed))
        )
        want = plain_rows(q, keys, values, rows, sinks)
        assert want.isfinite().all()
        torch.testing.assert_close(body(q, keys, values, rows, sinks), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("body", there)
@torch.inference_mode()
def test_in_bfloat16_every_body_is_near_the_plain_twin(body: Body) -> None:
    q, keys, values, rows = made(1, width=16)
    given = [x.bfloat16() for x in (q, keys, values)]
    want = plain_rows(*[x.float() for x in given], rows)  # type: ignore[call-arg, arg-type]
    found = body(*given, rows)  # type: ignore[call-arg, arg-type]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), want, rtol=0, atol=3e-2)


@pytest.mark.parametrize("body", there)
@torch.inference_mode()
def test_queries_that_do_not_lie_end_to_end(body: Body) -> None:
    q, keys, values, rows = made(2)
    wide = torch.cat([q, q], dim=1)
    torch.testing.assert_close(body(wide[:, :6], keys, values, rows), plain_rows(q, keys, values, rows))


@torch.inference_mode()
def test_the_body_that_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    q, keys, values, rows = made(0)
    assert body_for(q, keys) is (decoding.native_rows if native.built() else decoding.torch_rows)
    assert body_for(q.double(), keys) is decoding.torch_rows
    torch.testing.assert_close(
        decoding.row_attention(q, keys, values, rows), plain_rows(q, keys, values, rows), rtol=0, atol=2e-5
    )
    monkeypatch.setattr(native, "attends", lambda keys: False)
    assert body_for(q, keys) is decoding.torch_rows, "Triton is for GPUs"
