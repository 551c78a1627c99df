"""The formats mXvYgZ of weights in codebooks: their names, shapes and bits. Knows no tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from heliostat.errors import Refused

ENTRIES = 256
"""Vectors of a codebook: what the eight bits of a code tell apart."""
STRIP = 64
"""Rows whose codes the CPU kernel looks up at once."""
NAME = re.compile(r"m(?P<m>[1-9][0-9]?)v(?P<v>[1-9][0-9]{0,2})g(?P<g>[1-9][0-9]{0,5}|row|-1)")


@dataclass(frozen=True, slots=True)
class Format:
    """A row of a weight is cut in vectors of ``v`` numbers; each is a scale times the sum of ``m`` entries, one of
    each codebook, and there is a scale for every ``g`` numbers of the row (None: one for the row).

    Source: CodeGEMM, arXiv 2512.17970; eight bits a code.
    """

    m: int
    v: int
    g: int | None

    def __post_init__(self) -> None:
        if not (1 <= self.m < 100 and 1 <= self.v < 1000):
            raise Refused(f"format {self}: m must be from 1 to 99 and v from 1 to 999")
        if self.g is not None and (self.g < 1 or self.g % self.v):
            raise Refused(
                f"format {self}: g must be a multiple of v, so that a vector has one scale, or 'row'"
            )

    @classmethod
    def parse(cls, text: str) -> Format:
        """What "m1v4g128" or "m1v4grow" says; a group of -1 is a row too."""
        found = NAME.fullmatch(text)
        if found is None:
            raise Refused(
                f"{text!r} is no format: write mXvYgZ, X codebooks of vectors of Y numbers and a scale for every "
                "Z numbers, or 'row': m1v4g128"
            )
        g = None if found["g"] in ("row", "-1") else int(found["g"])
        return cls(int(found["m"]), int(found["v"]), g)

    def __str__(self) -> str:
        return f"m{self.m}v{self.v}g{'row' if self.g is None else self.g}"

    def segments(self, inputs: int) -> int:
        """Vectors of a row; what the last one has beyond the row stands for nothing."""
        return -(-inputs // self.v)

    def groups(self, inputs: int) -> int:
        """Scales of a row."""
        return 1 if self.g is None else -(-inputs // self.g)

    def shapes(self, outputs: int, inputs: int) -> Mapping[str, tuple[int, ...]]:
        """Of the three tensors that are a weight [outputs, inputs]; codes are uint8, the others numbers of 16 bits."""
        return {
            "codes": (outputs, self.segments(inputs), self.m),
            "codebooks": (self.m, ENTRIES, self.v),
            "scales": (outputs, self.groups(inputs)),
        }

    def bytes(self, outputs: int, inputs: int) -> int:
        """That the three tensors take."""
        codes = outputs * self.segments(inputs) * self.m
        return codes + 2 * self.m * ENTRIES * self.v + 2 * outputs * self.groups(inputs)

    def laid_bytes(self, outputs: int, inputs: int) -> int:
        """That the CPU kernel's own copy takes: whole strips of rows, codebooks in 32 bits and in 16."""
        rows, pairs = -(-outputs // STRIP) * STRIP, -(-self.v // 2)
        codes = rows * self.segments(inputs) * self.m
        return codes + self.m * ENTRIES * 4 * (self.v + pairs) + 2 * rows * self.groups(inputs)

    def bits(self, outputs: int, inputs: int) -> float:
        """Of a weight on average, codebooks and scales included."""
        return 8 * self.bytes(outputs, inputs) / (outputs * inputs)
