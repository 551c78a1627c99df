"""Plain text: packed rows say what documents apart would, and every row comes once an epoch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.errors import Refused
from heliostat.model.config import parse_config, read_config
from heliostat.model.seam import Causal
from heliostat.model.transformer import Transformer
from heliostat.model.weights import load_transformer
from heliostat.train.pretrain import shape_of
from heliostat.train.pretrain_recipe import PretrainRecipe
from heliostat.train.ranks import Ranks
from heliostat.train.text import PackedRows, TextMicro, TextObjective, text_loss

DOCUMENTS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Transformer:
    return load_transformer(tiny_base, read_config(tiny_base), dtype=torch.float32)


@given(DOCUMENTS, st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_rows_hold_the_documents_in_order(documents: list[list[int]], length: int) -> None:
    flat = [(n, token) for n, document in enumerate(documents) for token in document]
    if len(flat) < length:
        with pytest.raises(Refused, match="less than one row"):
            PackedRows.of(documents, length)
        return
    rows = PackedRows.of(documents, length)
    count = len(flat) // length * length
    assert rows.ids.flatten().tolist() == [token for _, token in flat[:count]]
    assert rows.documents.flatten().tolist() == [n for n, _ in flat[:count]]
    for row, numbers in zip(rows.positions.tolist(), rows.documents.tolist(), strict=True):
        for place, number in enumerate(numbers):
            begins = place == 0 or numbers[place - 1] != number
            assert row[place] == (0 if begins else row[place - 1] + 1)


@pytest.fixture(scope="module", params=["softmax", "sink", "gated", "affine", "affine+gated"])
def kind(request: pytest.FixtureRequest) -> Transformer:
    """A toy of each kind of attention, every part of which says something."""
    values: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    recipe = PretrainRecipe(output_dir="x", **values, intermediate_size=48, attention=request.param)
    torch.manual_seed(0)
    made = Transformer(parse_config(shape_of(recipe.resolve(bf16=False), 100)))
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        if name.endswith("alpha_ma"):
            tensor.uniform_(0.2, 0.8)
        elif "norm" not in name and name != "frequencies":
            torch.nn.init.normal_(tensor, std=0.3)
    return made.eval().requires_grad_(False)


def test_packed_documents_do_not_see_each_other(kind: Transformer) -> None:
    model = kind
    documents = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16]]
    rows = PackedRows.of(documents, 12)
    packed = float(TextMicro(model, rows.ids, rows.documents, rows.positions).loss())
    apart = 0.0
    for document in documents:
        ids = torch.tensor([document])
        with torch.no_grad():
            logits = model.logits(model(ids, torch.arange(len(document))[None], Causal()))
        apart -= float(logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum())
    assert packed == pytest.approx(apart, abs=1e-3)
    assert text_loss(model, rows) == pytest.approx(apart / 8, abs=1e-4)


def test_every_row_comes_once_an_epoch_and_the_seed_decides_when(model: Transformer) -> None:
    rows = PackedRows.of([[n] * 4 for n in range(10)], 4)

    def seen(seed: int, batch: int, accumulation: int, steps: int) -> list[int]:
        objective = TextObjective(model, rows, batch, accumulation, seed)
        return [
            int(m.ids[i, 0]) for s in range(steps) for m in objective.micros(s) for i in range(len(m.ids))
        ]

    first = seen(0, 3, 2, 5)  # 30 rows: three epochs, with batches across their borders
    assert len(first) == 30
    for epoch in range(3):
        assert sorted(first[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert first[:10] != first[10:20] and first == seen(0, 6, 1, 5) != seen(1, 3, 2, 5)


def test_two_processes_share_the_rows_that_one_sees_with_twice_the_batch(model: Transformer) -> None:
    rows = PackedRows.of([[n] * 4 for n in range(10)], 4)
    one = TextObjective(model, rows, 4, 2, 0)
    two = [TextObjective(model, rows, 2, 2, 0, ranks=Ranks(number, 2)) for number in range(2)]
    for step in range(4):
        alone = sorted(int(i) for m in one.micros(step) for i in m.ids[:, 0])
        together = sorted(int(i) for o in two for m in o.micros(step) for i in m.ids[:, 0])
        assert alone == together and all(len(o.micros(step)) == 2 for o in two)
