"""The benchmark of tuners: what is counted is exact, the model of dropped branches, refusals, the page."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from heliostat.bench import tuning_page
from heliostat.bench.stepping import Case, Phases, Tuned, Work
from heliostat.bench.tuning import Wish
from heliostat.errors import Refused

SMALL = Wish(
    hidden_size=64,
    layers=4,
    vocabulary=64,
    batch=2,
    length=16,
    spoken=4,
    r=4,
    peft=False,
    repeats=5,
    loss_steps=0,
)


def tuned(tuner: str, r: int | None = None) -> Tuned:
    return Tuned(Work(SMALL.config, 2, 16, 4, bf16=False), tuner, r)


def test_only_the_branches_shrink_in_the_model() -> None:
    parts = Phases(forward=2.0, backward=5.0, branches=4.0, rest=1.0, untaped=1.5)
    assert parts.ratio(0) == 1.0
    assert parts.ratio(0.5) == pytest.approx(6 / 8)
    assert parts.ratio(1) == pytest.approx(4 / 8)
    assert parts.whole_ratio(0) == 1.0
    assert parts.whole_ratio(1) == pytest.approx((8 - 4 - 0.5 - 1) / 8)


@pytest.mark.parametrize(("tuner", "r"), [("full", None), ("lora", 4), ("paca", 4)])
def test_phases_hold_each_other_and_leave_a_step_behind(tuner: str, r: int | None) -> None:
    model = tuned(tuner, r)
    before = {n: p.detach().clone() for n, p in model.parameters.items()}
    parts = model.phases()
    assert 0 < parts.branches <= parts.backward and parts.forward > 0 and parts.rest > 0
    assert any(not torch.equal(p, before[n]) for n, p in model.parameters.items())
    assert all(p.grad is None for p in model.parameters.values())


def test_the_bound_of_all_adapters_keeps_less_than_any_and_still_goes_back_to_the_first_block() -> None:
    frozen = tuned("frozen")
    (norm,) = frozen.parameters.values()
    before = norm.detach().clone()
    frozen.step(Case("frozen"))
    assert not torch.equal(norm, before)
    assert frozen.kept(Case("frozen")) < tuned("paca", 4).kept(Case("paca", 4))


def test_what_is_kept_shrinks_with_the_rate_and_with_columns() -> None:
    full, low, columns = tuned("full"), tuned("lora", 4), tuned("paca", 4)
    by_rate = [full.kept(Case("full", None, rate)) for rate in (0.0, 0.5, 0.75)]
    assert by_rate == sorted(by_rate, reverse=True) and by_rate[1] < 0.65 * by_rate[0]
    assert columns.kept(Case("paca", 4)) < low.kept(Case("lora", 4)) < by_rate[0]
    assert full.kept(Case("full", None, 0.0, True)) < by_rate[0] / 2


def test_kept_bytes_are_exact_where_they_can_be_reckoned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned("full")
    layer = nn.Linear(8, 8, bias=False)

    def loss(tape: object, ids: object, *, checkpointing: bool) -> torch.Tensor:
        x = torch.ones(4, 8, requires_grad=True) * 2  # saves a number, no tensor
        return layer(x).exp().sum()  # keeps x and exp's result

    monkeypatch.setattr(Tuned, "loss", lambda self, *a, **k: loss(*a, **k))
    weight = layer.weight.numel() * 4  # not one of the model's own parameters, so it counts
    assert model.kept(Case("full")) == 2 * 4 * 8 * 4 + weight


def test_fixed_memory_is_weights_gradients_and_moments() -> None:
    model = tuned("full")
    count = sum(p.numel() for p in model.parameters.values())
    assert model.fixed() - 12 * count - 4 * count == sum(b.nbytes for b in model.model.buffers())


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish(tuners=("full", "qlora")), "tuners qlora: there are full, lora, paca"),
        (Wish(rates=(0.0, 0.99)), "dropbp is 0.99"),
        (Wish(rates=(0.5,)), "0 must be among them"),
        (Wish(repeats=3), "at least 5"),
        (Wish(spoken=300), "more than the 256 tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(wish: Wish, message: str) -> None:
    with pytest.raises(Refused, match=message):
        wish.checked()


def test_a_page_has_every_case_the_model_and_verdicts(tmp_path: Path) -> None:
    from dataclasses import replace

    wish = replace(SMALL, tuners=("lora", "paca"), rates=(0.0, 0.5), budget_mib=4)
    found, page = tuning_page.main(wish, tmp_path, console=Console(file=io.StringIO()))
    names = {row["case"] for row in found["rows"]}
    assert names == {
        "lora r 4",
        "lora r 4, dropbp 0.5",
        "paca r 4",
        "paca r 8",
        "paca r 8, dropbp 0.5",
        "frozen",
    }
    text = page.read_text(encoding="utf-8")
    assert all(f"| {name} |" in text for name in names)
    assert "equal parameters" in text and "of 2 cases within 5%" in text and "- The bound:" in text
    longest = {(r["case"], r["checkpointing"]): r["longest"] for r in found["rows"]}
    assert longest["paca r 4", False] > longest["lora r 4", False] > 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "tuning.json",
        "tuning.md",
        "tuning-time.svg",
        "tuning-kept.svg",
        "tuning-dropbp.svg",
    }
