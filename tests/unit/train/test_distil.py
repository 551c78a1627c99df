"""A teacher's part of the loss: the formula, its gradient, a teacher that never moves, and teachers that do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.errors import Refused
from heliostat.model.config import read_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.weights import load_transformer
from heliostat.tasks import tokenizer as made
from heliostat.train.distil import Teacher, load_teacher
from heliostat.train.text import PackedRows, TextMicro, text_loss

DOCUMENTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16]]


def taught(folder: Path, weight: float, temperature: float, length: int = 12) -> Teacher:
    return load_teacher(
        folder,
        Tokenizer.load(folder),
        weight=weight,
        temperature=temperature,
        dtype=torch.float32,
        device="cpu",
        length=length,
    )


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.5, 2.0), (1.0, 4.0)])
def test_loss_and_gradient_are_the_formula(tiny_base: Path, weight: float, temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    others, targets = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 3, 6, 2, 2])
    loss = taught(tiny_base, weight, temperature).loss(logits, targets, others)
    p, q = (others / temperature).softmax(-1), (logits / temperature).softmax(-1)
    own = -logits.softmax(-1)[torch.arange(5), targets].log().sum()
    apart = (p * (p.log() - q.log())).sum()
    torch.testing.assert_close(loss, (1 - weight) * own + weight * temperature**2 * apart)
    loss.backward()
    sure = torch.nn.functional.one_hot(targets, 7)
    wanted = (1 - weight) * (logits.softmax(-1) - sure) + weight * temperature * (q - p)
    torch.testing.assert_close(logits.grad, wanted.detach())


def test_a_pupil_of_itself_learns_the_text_alone_and_a_teacher_stays(tiny_base: Path) -> None:
    rows = PackedRows.of(DOCUMENTS, 12)
    model = load_transformer(tiny_base, read_config(tiny_base), dtype=torch.float32).requires_grad_(True)
    plain = TextMicro(model, rows.ids, rows.documents, rows.positions).loss()
    teacher = taught(tiny_base, 0.25, 2.0)
    micro = TextMicro(model, rows.ids, rows.documents, rows.positions, teacher)
    loss = micro.loss()
    torch.testing.assert_close(loss, 0.75 * plain)  # nothing divides the two
    loss.backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert text_loss(model, rows) == pytest.approx(float(plain.detach()) / micro.spoken, abs=1e-5)


def test_a_teacher_with_another_tokenizer_is_refused_by_what_differs(tiny_base: Path, tmp_path: Path) -> None:
    made.save(made.train(vocabulary=290, texts=["quite other words " * 9]), tmp_path / "other")
    options: dict[str, Any] = {"weight": 0.5, "temperature": 1.0, "dtype": torch.float32, "device": "cpu"}
    with pytest.raises(Refused, match=r"has another tokenizer \(vocabulary or rules differ\)"):
        load_teacher(tiny_base, Tokenizer.load(tmp_path / "other"), length=8, **options)
    with pytest.raises(Refused, match="reads 256 tokens; max_length is 300"):
        taught(tiny_base, 0.5, 1.0, length=300)


def test_a_chat_template_is_not_what_text_meets(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = made.train(vocabulary=300, texts=["add 2 and 3"])
    for name in ("one", "two"):
        made.save(tokenizer, tmp_path / name)
    (tmp_path / "two" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "two" / name).write_bytes((tiny_base / name).read_bytes())
    teacher = load_teacher(
        tmp_path / "two",
        Tokenizer.load(tmp_path / "one"),
        weight=0.5,
        temperature=1.0,
        dtype=torch.float32,
        device="cpu",
        length=8,
    )
    assert len(teacher.digest) == 64
