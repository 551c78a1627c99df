"""The probe is at the bottom of its loss, knows what there is to know, and is refused where there is nothing to learn."""

import pytest
import torch

from heliostat.errors import Refused
from heliostat.judging.choice import area_under
from heliostat.judging.probe import PENALTIES, fit_probe


def some(rows: int, *, seed: int = 0, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 6, generator=chance) * torch.tensor([1.0, 50, 0.01, 1, 1, 0]) + 3
    direction = torch.tensor([1.0, 0.02, 0, -1, 0, 0])
    labels = (hidden - 3) @ direction + noise * torch.randn(rows, generator=chance) > 0
    return hidden, labels, torch.arange(rows) // 10


def test_the_gradient_of_the_penalised_loss_is_zero() -> None:
    hidden, labels, groups = some(400)
    probe = fit_probe(hidden, labels, groups, checked=torch.arange(0, 40, 5))
    x, y = hidden.double(), labels.double()
    spread = x.std(0, correction=0).clamp_min(1e-6)
    standard = (x - x.mean(0)) / spread
    weight = probe.weight.double() * spread
    wrong = torch.sigmoid(x @ probe.weight.double() + probe.bias) - y
    gradient = standard.T @ wrong / len(y) + probe.penalty * weight
    assert float(gradient.abs().max()) < 1e-4 and abs(float(wrong.mean())) < 1e-4
    assert probe.penalty in PENALTIES


def test_it_finds_what_tells_the_labels_apart() -> None:
    hidden, labels, groups = some(400)
    probe = fit_probe(hidden, labels, groups, checked=torch.arange(0, 40, 5))
    other, truth, _ = some(400, seed=1)
    scores = probe.scores(other)
    assert scores.dtype == torch.float32 and bool(((scores >= 0) & (scores <= 1)).all())
    assert area_under(scores.tolist(), truth.tolist()) > 0.9


def test_chance_is_penalised_more_than_what_can_be_known() -> None:
    hidden, labels, groups = some(200)
    by_chance = torch.rand(200, generator=torch.Generator().manual_seed(3)) > 0.5
    checked = torch.arange(0, 20, 5)
    known = fit_probe(hidden, labels, groups, checked=checked)
    assert fit_probe(hidden, by_chance, groups, checked=checked).penalty > known.penalty


@pytest.mark.parametrize(("label", "kind"), [(True, "acceptable"), (False, "unacceptable")])
def test_labels_of_one_kind_are_refused(label: bool, kind: str) -> None:
    hidden, _, groups = some(20)
    with pytest.raises(Refused, match=f"all 20 tokens are {kind}"):
        fit_probe(hidden, torch.full((20,), label), groups, checked=torch.tensor([0]))
