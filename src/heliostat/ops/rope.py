"""Rotary position embedding: frequencies for each kind of scaling, and the rotation itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heliostat.ops import native


def inverse_frequencies(rope: Mapping[str, Any], head_width: int) -> tuple[Tensor, float]:
    """Frequencies [D/2] float32 and the factor on cos and sin, as transformers computes them.

    ``dynamic`` equals ``default`` here: a model with it runs up to its original length only, because beyond
    that every key would depend on the total length and nothing could be cached.
    """
    theta, kind = rope["rope_theta"], rope["rope_type"]
    powers = theta ** (torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
    if kind == "linear":
        return 1.0 / powers / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(1.0 / powers, rope), 1.0
    if kind == "yarn":
        return _yarn(powers, rope, head_width)
    return 1.0 / powers, 1.0


def _llama3(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Long wavelengths stretched by ``factor``, short ones kept, a smooth ramp between."""
    original, low, high = (
        rope["original_max_position_embeddings"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
    )
    wavelength = 2 * math.pi / frequencies
    stretched = frequencies / rope["factor"]
    ramp = (original / wavelength - low) / (high - low)
    between = (1 - ramp) * stretched + ramp * frequencies
    out = torch.where(wavelength > original / low, stretched, between)
    return torch.where(wavelength < original / high, frequencies, out)


def _yarn(powers: Tensor, rope: Mapping[str, Any], head_width: int) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate slow dimensions, keep fast ones, scale attention by the stretch."""
    factor, original = rope["factor"], rope["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        return (
            head_width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))
        )

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    span = (high - low) or 0.001
    keep = 1 - ((torch.arange(head_width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    frequencies = (1 / (factor * powers)) * (1 - keep) + (1 / powers) * keep
    scale = rope.get("attention_factor")
    return frequencies, _yarn_scale(factor, rope) if scale is None else float(scale)


def _yarn_scale(factor: float, rope: Mapping[str, Any]) -> float:
    def stretch(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return stretch(rope["mscale"]) / stretch(rope["mscale_all_dim"])
    return stretch(1.0)


def cos_sin(
    positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [..., 1, D] in ``dtype`` for integer ``positions`` [...]; computed in float32."""
    angles = positions[..., None].float() * frequencies  # [..., D/2]
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)  # [..., 1, D]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


class Turned:
    """``cos_sin`` looked up: for passes of few rows, where computing them takes as long as a block does."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._of = self._cos = self._sin = torch.empty(0)

    def __call__(self, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, D] of ``positions`` [T]; no gradient passes. The table grows to twice what was asked for."""
        longest = int(positions.max())
        if longest >= len(self._cos) or self._cos.dtype != dtype or self._of is not frequencies:
            size, self._of = 1 << (longest + 1).bit_length(), frequencies
            self._cos, self._sin = cos_sin(torch.arange(size), frequencies, self._scale, dtype)
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads ``x`` [..., heads, D] by the angles of their positions; x itself may be changed."""
    if x.dim() == 3 and native.ready(x) and x[0].is_contiguous() and x.dtype == cos.dtype:
        native.rotate(x, cos, sin)
        return x
    return plain_rotate(x, cos, sin)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The twin of ``rotate``."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
