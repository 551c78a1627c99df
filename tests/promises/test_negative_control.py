"""Negative control: a half that was not trained as a half is clearly worse, on a task small enough for a test.

A base learns to copy five letters; members learn to move each letter three on through the alphabet. The same
steps, rate and data for each; one seed; so what is asserted is a wide margin and not a number.
"""

import copy
import random

import pytest
import torch
from torch import Tensor, nn

from heliostat.build import Loaded
from heliostat.family import SHARINGS, Row
from heliostat.model.config import parse_config
from heliostat.model.transformer import Transformer
from heliostat.train.data import Example
from heliostat.train.sharing import lay_out, log_probabilities, speak

LETTERS, FIRST, LONG, TURN, END = 20, 4, 5, 2, 3
SHAPE = {
    "model_type": "llama",
    "vocab_size": FIRST + LETTERS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
LEARNED, MARGIN = 0.1, 0.25
"""Nats a token: at most, of a half that was trained as one; at least, what another half loses."""


def examples(seed: int, count: int, *, moved: int) -> list[Example]:
    chance, found = random.Random(seed), []
    for _ in range(count):
        letters = [chance.randrange(LETTERS) for _ in range(LONG)]
        said = [FIRST + (letter + moved) % LETTERS for letter in letters]
        ids = (*(FIRST + letter for letter in letters), TURN, *said, END)
        found.append(Example(ids, ((LONG + 1, len(ids)),)))
    return found


def loss(row: Row, modules: dict[str, Loaded], batch: list[Example]) -> Tensor:
    layout = lay_out(batch, row)
    return -log_probabilities(speak(layout, row, modules), layout.targets).mean()


def learn(row: Row, modules: dict[str, Loaded], *, moved: int, steps: int, rate: float) -> None:
    parameters = list(modules["own"].model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - step / steps)
        loss(row, modules, examples(step, 32, moved=moved)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def own_of(model: Transformer, base: Transformer | None = None) -> dict[str, Loaded]:
    own = copy.deepcopy(model).requires_grad_(True)
    frozen = {} if base is None else {"base": Loaded("base", "", "base", base)}
    return {"own": Loaded("own", "", "own", own), **frozen}


@pytest.fixture(scope="module")
def base() -> Transformer:
    """A model that copies."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(parse_config(SHAPE))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1 if "embed" in name else parameter.shape[1] ** -0.5)
    modules = own_of(model)
    learn(SHARINGS["independent"].row, modules, moved=0, steps=250, rate=5e-3)
    return modules["own"].model.requires_grad_(False)


def tuned(sharing: str, base: Transformer) -> dict[str, Loaded]:
    modules = own_of(base, base)
    learn(SHARINGS[sharing].row, modules, moved=3, steps=150, rate=3e-3)
    return modules


@pytest.fixture(scope="module")
def ordinary(base: Transformer) -> dict[str, Loaded]:
    """A full fine-tune that knows of no sharing."""
    return tuned("independent", base)


@pytest.mark.parametrize("sharing", ["sun", "prefillshare", "icarus"])
def test_an_ordinary_fine_tune_is_no_half(
    sharing: str, base: Transformer, ordinary: dict[str, Loaded]
) -> None:
    row, held_out = SHARINGS[sharing].row, examples(10_000, 256, moved=3)
    half = tuned(sharing, base)
    with torch.no_grad():
        alone = float(loss(SHARINGS["independent"].row, ordinary, held_out))
        trained, borrowed = float(loss(row, half, held_out)), float(loss(row, ordinary, held_out))
        untuned = float(loss(row, own_of(base, base), held_out))
    assert alone < LEARNED  # it is a good fine-tune: as a half is where it fails
    assert trained < LEARNED
    assert borrowed > trained + MARGIN
    assert untuned > trained + MARGIN
