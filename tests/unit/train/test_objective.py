"""What is learned in a step: of the data or of a teacher, and the loss that evaluation reports."""

from pathlib import Path

import pytest
import torch
from torch import nn

from heliostat.build import Loaded
from heliostat.family import SHARINGS
from heliostat.model.config import read_config
from heliostat.model.transformer import Transformer
from heliostat.model.weights import load_transformer
from heliostat.train.data import Batches, Example
from heliostat.train.objective import MemberObjective, divergence, evaluation_loss

EXAMPLES = [
    Example((5, 6, 7, 20, 21, 2), ((3, 6),)),
    Example((8, 30, 2), ((1, 3),)),
    Example((9, 10, 40, 2, 11, 41, 42, 2), ((2, 4), (5, 8))),
]


def load(folder: Path, seed: int = 0) -> Transformer:
    model = load_transformer(folder, read_config(folder), dtype=torch.float32)
    if seed:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def modules(tiny_base: Path) -> dict[str, Loaded]:
    own, base, teacher = load(tiny_base, 1), load(tiny_base), load(tiny_base, 2)
    return {n: Loaded(n, n, n, m) for n, m in (("own", own), ("base", base), ("teacher", teacher))}


def objective(
    modules: dict[str, Loaded], sharing: str, *, taught: bool = False, accumulation: int = 1
) -> MemberObjective:
    batches = Batches(EXAMPLES, batch_size=2, seed=0)
    teacher = modules["teacher"] if taught else None
    return MemberObjective(batches, accumulation, SHARINGS[sharing].row, modules, teacher)


def test_divergence_is_that_of_the_book() -> None:
    p, q = torch.tensor([[0.2, 0.8], [0.5, 0.5]]), torch.tensor([[0.6, 0.4], [0.5, 0.5]])
    assert float(divergence(p.log() + 3, q.log() - 1)) == pytest.approx(
        float((p * (p / q).log()).sum()), abs=1e-6
    )
    assert float(divergence(p.log(), p.log())) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_row_learns_its_teacher_at_every_place_where_it_speaks(
    sharing: str, modules: dict[str, Loaded]
) -> None:
    row = SHARINGS[sharing].row
    micro = objective(modules, sharing, taught=True).micro(EXAMPLES)
    assert micro.tokens > sum(micro.layout.tokens.values())
    same = {**modules, row.speaker: modules["teacher"], row.prompt_writer: modules["teacher"]}
    same = {name: Loaded(name, name, name, modules["teacher"].model) for name in same}
    alike = objective({**same, "teacher": modules["teacher"]}, sharing, taught=True).micro(EXAMPLES)
    assert float(alike.loss()) == pytest.approx(0, abs=1e-4)  # who is the teacher has nothing to learn of it
    assert float(micro.loss()) > 0.1


def test_a_teacher_is_read_without_a_tape(modules: dict[str, Loaded]) -> None:
    own = modules["own"].model.requires_grad_(True)
    teacher = modules["teacher"].model.requires_grad_(True)
    try:
        objective(modules, "sun", taught=True).micro(EXAMPLES).loss().backward()
        assert all(p.grad is None for p in teacher.parameters())
        assert any(p.grad is not None for p in own.parameters())
    finally:
        for model in (own, teacher):
            model.requires_grad_(False)
            for parameter in model.parameters():
                parameter.grad = None


def test_steps_take_batches_in_turn(modules: dict[str, Loaded]) -> None:
    one = [m.spoken for step in range(4) for m in objective(modules, "sun").micros(step)]
    two = [m.spoken for step in range(2) for m in objective(modules, "sun", accumulation=2).micros(step)]
    assert one == two and len(one) == 4


@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_reported_loss_is_a_mean_over_answer_tokens(sharing: str, modules: dict[str, Loaded]) -> None:
    row = SHARINGS[sharing].row
    with torch.no_grad():
        total = sum(float(objective(modules, sharing).micro([e]).loss()) for e in EXAMPLES)
    spoken = sum(stop - start for e in EXAMPLES for start, stop in e.answers)
    for size in (1, 2, 32):
        got = evaluation_loss(EXAMPLES, row, modules, bf16=False, batch_size=size)
        assert got == pytest.approx(total / spoken, abs=1e-4)
    assert evaluation_loss(EXAMPLES, row, modules, bf16=True) == pytest.approx(total / spoken, abs=0.2)


def test_nothing_is_left_trainable_by_looking(modules: dict[str, Loaded]) -> None:
    evaluation_loss(EXAMPLES, SHARINGS["sun"].row, modules, bf16=False)
    assert not any(
        isinstance(p, nn.Parameter) and p.requires_grad
        for m in modules.values()
        for p in m.model.parameters()
    )
