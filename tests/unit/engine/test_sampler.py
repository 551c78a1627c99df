"""From logits to tokens: every sampling field, the right distribution, noise of the request alone."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.engine.request import Sampling
from heliostat.engine.sampler import Draw, sample, uniform

LOGITS = torch.tensor([1.5, 0.2, -1.0, 0.7, 2.1, -0.4, 0.0, -3.0])
V = len(LOGITS)


def draw(answer: tuple[int, ...] = (), *, eos: tuple[int, ...] = (7,), **options: Any) -> Draw:
    return Draw(Sampling(**{"temperature": 1.0, **options}), answer, eos)


def shares(count: int = 4000, logits: torch.Tensor = LOGITS, **options: Any) -> Counter[int]:
    """How often each token is drawn, by seed."""
    draws = [draw(seed=seed, **options) for seed in range(count)]
    return Counter(s.token for s in sample(logits.expand(count, -1), draws))


def assert_distributed(found: Counter[int], chances: torch.Tensor) -> None:
    """Chi-square of counts against a distribution, at one in a thousand; nothing of chance 0 is ever drawn."""
    total = sum(found.values())
    assert all(chances[token] > 0 for token in found)
    kept = [i for i in range(V) if chances[i] * total >= 5]
    if len(kept) == 1:
        return
    statistic = sum((found[i] - total * float(chances[i])) ** 2 / (total * float(chances[i])) for i in kept)
    freedom = len(kept) - 1
    limit = (
        freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    )  # Wilson and Hilferty
    assert statistic < limit, (statistic, limit)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_logits_say(temperature: float) -> None:
    assert_distributed(shares(temperature=temperature), (LOGITS / temperature).softmax(-1))


def cut(chances: torch.Tensor, keep: list[int]) -> torch.Tensor:
    out = torch.zeros_like(chances)
    out[keep] = chances[keep]
    return out / out.sum()


ORDER = LOGITS.argsort(descending=True).tolist()


def test_cuts_keep_the_likeliest_and_their_proportions() -> None:
    chances = LOGITS.softmax(-1)
    assert_distributed(shares(top_k=3), cut(chances, ORDER[:3]))
    assert_distributed(
        shares(min_p=0.2), cut(chances, [i for i in range(V) if chances[i] >= 0.2 * chances.max()])
    )
    reach = chances[ORDER].cumsum(0).tolist()
    for top_p in (0.3, 0.6, 0.9):
        kept = next(i for i, r in enumerate(reach) if r >= top_p) + 1
        assert_distributed(shares(top_p=top_p), cut(chances, ORDER[:kept]))


def test_top_p_is_of_what_top_k_left() -> None:
    """Cuts one after another, as other engines make them."""
    left = cut(LOGITS.softmax(-1), ORDER[:3])
    reach = left[ORDER[:3]].cumsum(0).tolist()
    top_p = (reach[0] + 0.01 + reach[1]) / 2  # two tokens of these three, more of the whole
    assert sum(LOGITS.softmax(-1)[ORDER[:2]]) < top_p < reach[1]
    assert_distributed(shares(top_k=3, top_p=top_p), cut(left, ORDER[:2]))


@given(
    st.floats(0.01, 3),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.integers(0, V),
    st.integers(0, 99),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_whatever_the_cuts_the_best_token_can_be_drawn(
    temperature: float, top_p: float, min_p: float, top_k: int, seed: int, place: int
) -> None:
    wish = draw((0,) * place, temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k, seed=seed)
    token = sample(LOGITS[None], [wish])[0].token
    allowed = set(ORDER[: top_k or V])
    assert token in allowed
    if top_k == 1 or top_p <= 0.01:
        assert token == ORDER[0]


def test_greedy_is_the_best_token_and_needs_no_seed() -> None:
    for seed in range(5):
        assert sample(LOGITS[None], [draw(temperature=0.0, seed=seed)])[0].token == 4
    assert sample(LOGITS[None], [draw(temperature=1e-9)])[0].token == 4


def test_noise_is_a_function_of_seed_choice_and_place() -> None:
    numbers = {uniform(s, c, p) for s in range(10) for c in range(5) for p in range(20)}
    assert len(numbers) == 1000 and all(0 <= n < 1 for n in numbers)
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    assert abs(sum(numbers) / 1000 - 0.5) < 0.03


def test_every_place_of_an_answer_has_noise_of_its_own() -> None:
    flat = torch.zeros(V)
    for seed, choice in ((3, 0), (0, 3)):
        draws = [draw((0,) * place, seed=seed, choice=choice) for place in range(4000)]
        assert_distributed(Counter(s.token for s in sample(flat.expand(4000, -1), draws)), flat.softmax(-1))


def test_the_batch_changes_nothing() -> None:
    logits = torch.randn(30, V, generator=torch.Generator().manual_seed(0))
    draws = [
        draw((1,) * (i % 4), seed=i, temperature=(0.0, 0.7, 1.3)[i % 3], top_k=i % 5, logprobs=2)
        for i in range(30)
    ]
    together = sample(logits, draws)
    alone = [sample(logits[i : i + 1], [draws[i]])[0] for i in range(30)]
    assert [s.token for s in together] == [s.token for s in alone]
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1)).tolist()
    assert [s.token for s in sample(logits[order], [draws[i] for i in order])] == [
        alone[i].token for i in order
    ]
    assert sample(logits[:0], []) == []


def test_penalties_and_bias_move_logits_as_they_say() -> None:
    answer = (4, 4, 0)
    changed = LOGITS.clone()
    changed[4] -= 0.5 + 2 * 0.25
    changed[0] -= 0.5 + 0.25
    draws = [draw(answer, seed=s, presence_penalty=0.5, frequency_penalty=0.25) for s in range(4000)]
    found = Counter(s.token for s in sample(LOGITS.expand(4000, -1), draws))
    assert_distributed(found, changed.softmax(-1))
    biased = LOGITS.clone()
    biased[2] += 2.5
    biased[4] -= 100
    assert_distributed(shares(logit_bias={2: 2.5, 4: -100}), biased.softmax(-1))
    before = LOGITS.clone()
    shares(10, logit_bias={1: 5.0})
    assert torch.equal(LOGITS, before)  # the runner's logits are not written to


def test_an_end_is_held_back_until_enough_was_said() -> None:
    logits = torch.zeros(V)
    logits[7], logits[6] = 9.0, 5.0
    for count, token in ((0, 6), (1, 6), (2, 7)):
        wish = draw((1,) * count, temperature=0.0, min_tokens=2)
        assert sample(logits[None], [wish])[0].token == token
    held = draw(temperature=0.0, min_tokens=2, logit_bias={7: 100.0})
    assert sample(logits[None], [held])[0].token == 6


def test_log_probabilities_are_the_model_s_own() -> None:
    """Before temperature and cuts, in nats; the chosen token's whatever was chosen."""
    chances = LOGITS.log_softmax(-1)
    found = sample(LOGITS[None], [draw(temperature=5.0, seed=3, logprobs=3)])[0]
    assert found.logprob == pytest.approx(float(chances[found.token]), abs=1e-6)
    assert [token for token, _ in found.top] == ORDER[:3]
    assert [chance for _, chance in found.top] == pytest.approx(chances[ORDER[:3]].tolist(), abs=1e-6)
    assert sample(LOGITS[None], [draw(logprobs=0)])[0].top == ()
    assert sample(LOGITS[None], [draw()])[0].logprob is None
    assert len(sample(LOGITS[None], [draw(logprobs=99)])[0].top) == V  # no more than there are
