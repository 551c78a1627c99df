"""A checkpoint some of whose Linears lie in codebooks: what its ``quantization.json`` says, and its tensors on disk.

Codes, codebooks and scales stand under the Linear's name where its weight would; all else is as in any checkpoint.
Knows no transformer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heliostat.errors import Refused
from heliostat.files import atomic_write_text, read_json
from heliostat.model.alpha import format_of
from heliostat.ops.codebook import Coded
from heliostat.ops.codebook_format import Format

QUANTIZATION = "quantization.json"
VERSION = 1
PARTS = ("codes", "codebooks", "scales")
WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which Linears of a checkpoint lie in codebooks, and how."""

    format: Format
    linears: tuple[str, ...]
    """Their paths, sorted."""
    source: Mapping[str, str] = field(default_factory=dict)
    """``module`` and ``digest`` of what it was made from, for people to read."""
    report: Mapping[str, Any] = field(default_factory=dict)
    """How well it went: errors by layer, perplexities. For people to read, no part of the digest."""

    @property
    def facts(self) -> dict[str, Any]:
        """What belongs to the module's digest."""
        return {"format": str(self.format), "linears": list(self.linears)}

    def write(self, folder: Path) -> None:
        """Write ``quantization.json``."""
        told = {"format_version": VERSION, **self.facts, "source": self.source, "report": self.report}
        atomic_write_text(Path(folder) / QUANTIZATION, json.dumps(told, indent=2) + "\n")

    def shapes(self, plain: Mapping[str, Sequence[int]], folder: Path) -> dict[str, tuple[int, ...]]:
        """Of the tensors on disk, for a model whose ``plain`` ones have these. Refused where it lacks one of the Linears."""
        found = {name: tuple(shape) for name, shape in plain.items()}
        for path in self.linears:
            if path + WEIGHT not in found:
                raise Refused(f"{folder / QUANTIZATION} names the Linear {path!r}, which this model has not")
            outputs, inputs = found.pop(path + WEIGHT)
            found |= {f"{path}.{part}": s for part, s in self.format.shapes(outputs, inputs).items()}
        return found

    def is_coded(self, name: str) -> bool:
        """Whether a tensor on disk is part of a Linear in codebooks: it keeps its number format wherever it is loaded."""
        return name.rpartition(".")[0] in self.linears and name.rpartition(".")[2] in PARTS

    def take(self, tensors: dict[str, Tensor], path: str, inputs: int, folder: Path) -> Coded:
        """The Linear at ``path``, taken out of ``tensors``. Refused where they are not what the format says."""
        try:
            return Coded(self.format, inputs, *(tensors.pop(f"{path}.{part}") for part in PARTS))
        except Refused as error:
            raise Refused(f"{folder}: {path}: {error}") from error


def read_quantization(folder: Path) -> Quantization | None:
    """What a checkpoint's ``quantization.json`` says; None where all its Linears are plain. Refused where it is damaged."""
    path = Path(folder) / QUANTIZATION
    if not path.is_file():
        return None
    told = read_json(path)
    if told.get("format_version") != VERSION:
        raise Refused(
            f"{path} has format_version {told.get('format_version')!r}; this heliostat reads {VERSION}"
        )
    linears = told.get("linears")
    if not isinstance(linears, list) or not linears or not all(isinstance(name, str) for name in linears):
        raise Refused(f"{path} is damaged: linears must be a list of names, it is {linears!r}")
    source, report = told.get("source") or {}, told.get("report") or {}
    if not isinstance(source, dict) or not isinstance(report, dict):
        raise Refused(f"{path} is damaged: source and report must be objects")
    return Quantization(Format.parse(str(told.get("format"))), tuple(sorted(set(linears))), source, report)


def coded_tensors(path: str, coded: Coded) -> dict[str, Tensor]:
    """A Linear in codebooks under its names on disk."""
    return {f"{path}.{part}": getattr(coded, part) for part in PARTS}


def loaded_bytes(
    shapes: Iterable[tuple[str, Sequence[int]]], dtype: torch.dtype, quantization: Quantization | None
) -> int:
    """Bytes that tensors of these names and shapes take in memory, where plain numbers are loaded as ``dtype``."""

    def each(name: str) -> int:
        if quantization is None or not quantization.is_coded(name):
            return format_of(name, dtype).itemsize
        return 1 if name.endswith(".codes") else 2

    return sum(math.prod(shape) * each(name) for name, shape in shapes)


def copied_bytes(
    shapes: Iterable[tuple[str, Sequence[int]]], dtype: torch.dtype, quantization: Quantization
) -> int:
    """Bytes that come on top while it serves, at most: a dense copy of each Linear for many rows, and, in the number
    format in which codes are looked up, one of its codes as the kernel reads them.
    """
    format = quantization.format
    coded = [shape for name, shape in shapes if name.endswith(".codes") and quantization.is_coded(name)]
    sizes = [(outputs, segments * format.v) for outputs, segments, _ in coded]
    laid = sum(format.laid_bytes(*size) for size in sizes) if dtype == torch.bfloat16 else 0
    return laid + sum(outputs * inputs for outputs, inputs in sizes) * dtype.itemsize
