"""Rotary positions: frequencies as transformers computes them, rotations that know only distances."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from heliostat.ops.rope import Turned, cos_sin, inverse_frequencies, rotate

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, **LLAMA3},
    {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8, **LLAMA3},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 128},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.7},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.2,
    },
]


@pytest.mark.parametrize("rope", KINDS, ids=lambda r: "-".join(str(v) for v in r.values()))
@pytest.mark.parametrize("theta", [100.0, 10_000.0, 1_000_000.0])
@pytest.mark.parametrize("width", [4, 16, 64])
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], theta: float, width: int) -> None:
    facts = {**rope, "rope_theta": theta}
    config = LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        head_dim=width,
        max_position_embeddings=128,
        rope_parameters=dict(facts),
    )
    want, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    got, ours = inverse_frequencies(facts, width)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    assert ours == pytest.approx(scale)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 300), st.sampled_from([2, 8, 32]))
@settings(max_examples=30, deadline=None)
def test_a_rotated_product_depends_on_the_distance_alone(
    one: int, other: int, shift: int, width: int
) -> None:
    frequencies, scale = inverse_frequencies({"rope_type": "default", "rope_theta": 10_000.0}, width)
    q, k = torch.randn(2, width, dtype=torch.float64)

    def product(first: int, second: int) -> float:
        cos, sin = cos_sin(torch.tensor([first, second]), frequencies.double(), scale, torch.float64)
        return float(rotate(q[None], cos[0], sin[0]) @ rotate(k[None], cos[1], sin[1]).T)

    assert product(one, other) == pytest.approx(product(one + shift, other + shift), abs=2e-2)


def test_rotation_keeps_lengths_and_position_zero_turns_nothing() -> None:
    frequencies, scale = inverse_frequencies({"rope_type": "default", "rope_theta": 10_000.0}, 8)
    x = torch.randn(5, 3, 8)
    cos, sin = cos_sin(torch.arange(5), frequencies, scale, torch.float32)
    turned = rotate(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[0], x[0])
    assert cos_sin(torch.arange(5), frequencies, scale, torch.bfloat16)[0].dtype is torch.bfloat16


def test_angles_looked_up_are_those_computed_as_far_as_anybody_asks() -> None:
    frequencies, scale = inverse_frequencies(
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10_000.0},
        8,
    )
    turned = Turned(scale)
    for positions, dtype in (
        ([0], torch.float32),
        ([5, 3, 5], torch.float32),
        ([4095], torch.bfloat16),
        ([7], torch.float32),
    ):
        where = torch.tensor(positions)
        for found, computed in zip(
            turned(where, frequencies, dtype), cos_sin(where, frequencies, scale, dtype), strict=True
        ):
            assert found.dtype is dtype
            torch.testing.assert_close(found, computed)
    other = frequencies / 2
    assert torch.equal(
        turned(torch.tensor([3]), other, torch.float32)[0],
        cos_sin(torch.tensor([3]), other, scale, torch.float32)[0],
    )
