"""Rates and draws of dropped branches: the share that is asked for, the same cost in every step, each its own chance."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.errors import Refused
from heliostat.train.droprates import (
    CAP,
    CLOSE,
    HIGHEST,
    Branch,
    by_sensitivity,
    check_rate,
    draw,
    dropped_share,
    uniform,
)

RATES = st.sampled_from([0.1, 0.3, 0.5, 0.75, 0.875, 0.95])


def branches(layers: int, *, mlp: float = 3.0, trained: bool = True) -> tuple[Branch, ...]:
    return tuple(
        Branch(layer, kind, flops, trained)
        for layer in range(layers)
        for kind, flops in (("attention", 1.0), ("mlp", mlp))
    )


@pytest.mark.parametrize("rate", [-0.1, 0.951, 1.0, float("nan")])
def test_a_rate_outside_is_refused_with_the_limits(rate: float) -> None:
    with pytest.raises(Refused, match=r"dropbp is .*0 to 0\.95"):
        check_rate(rate)
    assert check_rate(HIGHEST) == HIGHEST


@settings(max_examples=40)
@given(st.integers(1, 40), RATES, st.integers(0, 2**32), st.floats(0.3, 6))
def test_the_share_that_is_dropped_is_the_one_asked_for(
    layers: int, rate: float, seed: int, mlp: float
) -> None:
    chance = random.Random(seed)
    found = branches(layers, mlp=mlp)
    measured = [chance.choice([0.0, chance.random(), 1e3 * chance.random()]) for _ in found]
    for rates in (uniform(found, rate), by_sensitivity(found, measured, rate, seed=seed)):
        assert dropped_share(found, rates) == pytest.approx(rate, abs=CLOSE + 1e-9)
        assert all(-1e-9 <= r <= 1 for r in rates)


def test_the_insensitive_are_dropped_most_and_nobody_above_the_cap_by_much() -> None:
    found = branches(16)
    measured = [float(1 + i) for i in range(len(found))]
    rates = by_sensitivity(found, measured, 0.5, seed=0)
    by_kind = {
        kind: [r for b, r in zip(found, rates, strict=True) if b.kind == kind]
        for kind in ("attention", "mlp")
    }
    for ordered in by_kind.values():
        assert ordered == sorted(ordered, reverse=True)
        assert ordered[0] > ordered[-1] and ordered[0] <= CAP + 0.05


def test_equal_sensitivities_favour_no_depth() -> None:
    found = branches(32)
    early = late = 0.0
    for seed in range(40):
        rates = by_sensitivity(found, [1.0] * len(found), 0.45, seed=seed)
        early += sum(r for b, r in zip(found, rates, strict=True) if b.layer < 16)
        late += sum(r for b, r in zip(found, rates, strict=True) if b.layer >= 16)
    assert early == pytest.approx(late, rel=0.02)


@settings(max_examples=15)
@given(st.integers(12, 32), RATES, st.integers(0, 100))
def test_every_step_of_a_deep_model_costs_the_same(layers: int, rate: float, seed: int) -> None:
    found = branches(layers, mlp=4.2)
    chance = random.Random(seed)
    rates = by_sensitivity(found, [chance.random() for _ in found], rate, seed=seed)
    kept = {
        kind: sum(1 - r for b, r in zip(found, rates, strict=True) if b.kind == kind)
        for kind in ("attention", "mlp")
    }
    costs = {
        sum(b.flops for b, keep in zip(found, draw(found, rates, seed=seed, step=step), strict=True) if keep)
        for step in range(20)
    }
    if all(abs(n - round(n)) < 1e-9 for n in kept.values()):
        assert max(costs) - min(costs) < 1e-9
    assert max(costs) - min(costs) <= 1 + 4.2 + 1e-9  # never more than one branch of each kind


def test_llama_8b_keeps_whole_numbers() -> None:
    found = branches(32, mlp=4.2)
    for rate in (0.5, 0.75, 0.875):
        chance = random.Random(3)
        rates = by_sensitivity(found, [chance.random() for _ in found], rate, seed=0)
        counts = {sum(draw(found, rates, seed=0, step=step)) for step in range(50)}
        assert len(counts) == 1


@pytest.mark.parametrize("layers", [2, 3, 8])
def test_every_branch_is_kept_as_often_as_its_rate_says(layers: int) -> None:
    found, steps = branches(layers, trained=False), 2_000
    chance = random.Random(1)
    rates = by_sensitivity(found, [chance.random() for _ in found], 0.6, seed=0)
    kept = [0] * len(found)
    for step in range(steps):
        for i, keep in enumerate(draw(found, rates, seed=5, step=step)):
            kept[i] += keep
    for count, rate in zip(kept, rates, strict=True):
        assert count / steps == pytest.approx(1 - rate, abs=0.05)


def test_a_draw_is_a_function_of_seed_and_step() -> None:
    found = branches(8)
    rates = uniform(found, 0.5)
    assert draw(found, rates, seed=1, step=7) == draw(found, rates, seed=1, step=7)
    assert len({draw(found, rates, seed=1, step=step) for step in range(20)}) > 5
    state = random.getstate()
    draw(found, rates, seed=1, step=7)
    assert random.getstate() == state


def test_something_that_is_trained_is_always_kept() -> None:
    found = tuple(Branch(b.layer, b.kind, b.flops, b.kind == "attention") for b in branches(2))
    rates = uniform(found, 0.95)
    for step in range(200):
        kept = draw(found, rates, seed=0, step=step)
        assert any(keep and b.trained for b, keep in zip(found, kept, strict=True))
