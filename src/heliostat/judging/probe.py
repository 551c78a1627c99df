"""Logistic regression on hidden states by torch's L-BFGS, in float64: standardised, with a quadratic penalty.

The penalty is chosen on tokens of other prompts; standardisation is folded into the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.errors import Refused

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried for the squared weights, beside the mean loss of a token."""
STEPS = 200
SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True, slots=True)
class Probe:
    """sigmoid(hidden @ weight + bias) is the probability that a token will do."""

    weight: Tensor  # [E] float32
    bias: float
    penalty: float
    """As it was chosen."""

    def scores(self, hidden: Tensor) -> Tensor:
        """Probabilities [M] float32 of states [M, E]."""
        return torch.sigmoid((hidden.float() * self.weight).sum(-1) + self.bias)


def fit_probe(hidden: Tensor, labels: Tensor, groups: Tensor, *, checked: Tensor) -> Probe:
    """The probe of states [M, E] and labels [M] (bool), its penalty the one with the least loss on ``checked`` groups.

    ``groups`` [M]: the prompt of each token; those in ``checked`` decide on the penalty, then all are learned. Refused
    where all labels are the same.
    """
    if labels.all() or not labels.any():
        kind = "acceptable" if labels.any() else "unacceptable"
        raise Refused(
            f"all {len(labels)} tokens are {kind}: there is nothing to tell apart; give more prompts, or another "
            "--share or --tau"
        )
    aside = torch.isin(groups, checked)
    penalty = PENALTIES[len(PENALTIES) // 2]
    if _both(labels[aside]) and _both(labels[~aside]):
        tried = {
            each: _loss(_fitted(hidden[~aside], labels[~aside], each), hidden[aside], labels[aside])
            for each in PENALTIES
        }
        penalty = min(tried, key=lambda each: tried[each])
    return _fitted(hidden, labels, penalty)


def _both(labels: Tensor) -> bool:
    return bool(labels.any() and not labels.all())


def _fitted(hidden: Tensor, labels: Tensor, penalty: float) -> Probe:
    x, y = hidden.double(), labels.double()
    mean, spread = x.mean(0), x.std(0, correction=0).clamp_min(SMALLEST_SPREAD)
    x = (x - mean) / spread
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    share = y.mean()
    bias = (share / (1 - share)).log()[None].clone().requires_grad_(True)
    descent = torch.optim.LBFGS(
        [weight, bias],
        max_iter=STEPS,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        descent.zero_grad()
        said = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, y)
        total = said + penalty / 2 * weight.square().sum()
        total.backward()
        return total

    descent.step(loss)
    weight, bias = weight.detach() / spread, bias.detach()
    return Probe(weight.float(), float(bias - (weight * mean).sum()), penalty)


def _loss(probe: Probe, hidden: Tensor, labels: Tensor) -> float:
    logits = hidden.double() @ probe.weight.double() + probe.bias
    return float(torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.double()))
