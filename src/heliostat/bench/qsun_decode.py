"""Decode steps of the engine with a speaker in codebooks beside the same with a plain one, in turns, and what both weigh.

``python -m heliostat.bench.qsun_decode`` measures a shape with random weights and puts the table into docs/results/qsun.md.
A step counts whole: scheduling, passes, sampling, text.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from heliostat.bench.birth import certificate
from heliostat.bench.decode import SHAPES, Ours, shape
from heliostat.bench.qsun import PAGE, page
from heliostat.build import best_dtype
from heliostat.files import atomic_write_text, read_json
from heliostat.linear.codebook import put_codebook
from heliostat.model.config import parse_config
from heliostat.model.transformer import Transformer
from heliostat.ops.codebook import Coded
from heliostat.ops.codebook_format import ENTRIES, Format

BATCHES = (1, 2, 4, 8, 16, 32)
REPEATS = 5


def plain(name: str) -> Transformer:
    """A model of that shape with random weights, frozen."""
    model = Transformer(parse_config(shape(name))).to(best_dtype()).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def coded(name: str, format: Format) -> Transformer:
    """The same with the Linears of its blocks in codebooks by chance: what they hold changes no time."""
    model = plain(name)
    for path, linear in [(p, m) for p, m in model.named_modules() if p.startswith("model.layers.")]:
        if isinstance(linear, torch.nn.Linear):
            shapes = format.shapes(linear.out_features, linear.in_features)
            codes = torch.randint(0, ENTRIES, shapes["codes"], dtype=torch.uint8)
            books, scales = torch.randn(shapes["codebooks"]).half(), torch.full(shapes["scales"], 0.02).half()
            put_codebook(model, path, Coded(format, linear.in_features, codes, books, scales))
    return model


def weight(model: Transformer) -> float:
    """MB of all tensors of the blocks as they lie in memory now, each storage once."""
    held: dict[int, int] = {}
    for path, module in model.named_modules():
        if path.startswith("model.layers."):
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            tensors += [t for t in vars(module).values() if isinstance(t, torch.Tensor)]
            held |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values()) / 1e6


def measure(name: str, format: Format, batches: Sequence[int], *, seed: int = 0) -> dict[str, Any]:
    """Tokens a second of both by batch, medians of REPEATS runs of each in turns, and the median of their ratios."""
    torch.manual_seed(seed)
    sides = {"plain": Ours(plain(name)), "coded": Ours(coded(name, format))}
    for side in sides.values():
        side.decode(2, seed)
    found: dict[str, Any] = {}
    for batch in batches:
        speeds: dict[str, list[float]] = {"plain": [], "coded": []}
        for again in range(REPEATS):
            for which, side in sides.items():
                speeds[which].append(batch / side.decode(batch, seed + 1000 * batch + again))
        ratios = [b / a for a, b in zip(speeds["plain"], speeds["coded"], strict=True)]
        found[str(batch)] = {which: statistics.median(own) for which, own in speeds.items()}
        found[str(batch)]["ratio"] = statistics.median(ratios)
    return {"batches": found, "megabytes": [weight(side.model) for side in sides.values()]}


def main() -> None:
    """Measure, and write the table beside the accuracy that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="100M", choices=list(SHAPES))
    parser.add_argument("--format", default="m1v4g128", type=Format.parse)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    given = parser.parse_args()
    speed = measure(given.shape, given.format, [int(batch) for batch in given.batches.split(",")])
    command = f"python -m heliostat.bench.qsun_decode --shape {given.shape} --format {given.format}"
    speed |= {
        "shape": given.shape,
        "format": str(given.format),
        "repeats": REPEATS,
        "birth": certificate(command),
    }
    kept = given.docs / f"{PAGE}.json"
    told = read_json(kept) if kept.exists() else {"birth": None, "modules": {}, "tasks": {}}
    told["speed"] = speed
    atomic_write_text(kept, json.dumps(told, indent=1) + "\n")
    atomic_write_text(given.docs / f"{PAGE}.md", page(told["tasks"], told["modules"], speed, told["birth"]))
    print(json.dumps(speed["batches"], indent=1), speed["megabytes"])


if __name__ == "__main__":
    main()
