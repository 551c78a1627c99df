"""Products with weights in codebooks on a GPU beside the dense bf16 ones of its own library; a part of ``bench.gpu``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from heliostat.bench.decode import median
from heliostat.bench.kernels import made
from heliostat.ops.codebook import Coded
from heliostat.ops.codebook_format import Format
from heliostat.ops.codebook_product import CodedProduct

SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336))
"""Outputs and inputs of the Linears of Llama-3.1-8B, those of one input joined."""
FORMATS = ("m1v4g128", "m2v8g128", "m2v4g128")
ROTATED = 8
"""Weights taken in turn, so that none waits in a cache."""


@torch.inference_mode()
def codebooks(device: str, batches: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Seconds of one product for each shape, format and batch, and how far it is from the plain twin."""
    rows = []
    cpu = device == "cpu"
    for outputs, inputs in ((64, 128),) if cpu else SHAPES:
        dense = [torch.randn(outputs, inputs, device=device).bfloat16() for _ in range(ROTATED)]
        for name in FORMATS:
            coded = [_on(device, made(Format.parse(name), outputs, inputs)) for _ in range(ROTATED)]
            products = [CodedProduct(one) for one in coded]
            for batch in batches:
                x = torch.randn(batch, inputs, device=device).bfloat16()
                want = x.float() @ coded[0].dense(torch.float32).T
                row: dict[str, Any] = {"shape": f"{outputs}x{inputs}", "format": name, "batch": batch}
                row["error"] = float((products[0](x).float() - want).norm() / want.norm())
                row["dense"] = median(
                    partial(_turns, [partial(functional.linear, x, w) for w in dense], device), repeats
                )
                row["coded"] = median(partial(_turns, [partial(one, x) for one in products], device), repeats)
                rows.append(row)
    return rows


def _on(device: str, coded: Coded) -> Coded:
    parts = (part.to(device) for part in (coded.codes, coded.codebooks, coded.scales))
    return Coded(coded.format, coded.inputs, *parts)


def _turns(runs: Sequence[Any], device: str) -> None:
    for run in runs:
        run()
    if device != "cpu":
        torch.cuda.synchronize(device)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "",
        f"Weights in codebooks, {ROTATED} taken in turn, microseconds of all; launches count:",
        "",
        "| shape | format | batch | dense bf16 | codebooks | ratio | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        told = f"{1e6 * row['dense']:.0f} | {1e6 * row['coded']:.0f} | {row['dense'] / row['coded']:.2f}x"
        lines.append(f"| {row['shape']} | {row['format']} | {row['batch']} | {told} | {row['error']:.1e} |")
    return lines
