"""Growing: the larger model says what the smaller one said, every new part learns, and what does not fit is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from heliostat.bench.grown import grow
from heliostat.errors import Refused
from heliostat.model.config import read_config
from heliostat.model.seam import Causal
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.model.weights import load_transformer

LARGER = {"width": 64, "layers": 3, "mlp_width": 96}


def loaded(folder: Path) -> Transformer:
    return load_transformer(folder, read_config(folder), dtype=torch.float32)


def logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(ids, torch.arange(ids.shape[1]).expand_as(ids), Causal()))


def test_the_larger_model_says_what_the_smaller_one_said(tiny_base: Path, tmp_path: Path) -> None:
    larger = grow(tiny_base, tmp_path / "larger", **LARGER)
    config = read_config(larger)
    assert (config.width, config.layers, config.mlp_width, config.heads, config.kv_heads) == (64, 3, 96, 8, 4)
    ids = torch.randint(0, config.vocabulary, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        old, new = logits(loaded(tiny_base), ids), logits(loaded(larger), ids)
    assert torch.allclose(old, new, atol=2e-4), (old - new).abs().max()
    assert Tokenizer.load(larger).encode("add 2 and 3") == Tokenizer.load(tiny_base).encode("add 2 and 3")
    assert {p.name for p in larger.iterdir()} == {p.name for p in tiny_base.iterdir()}


def test_every_new_part_learns_after_two_steps(tiny_base: Path, tmp_path: Path) -> None:
    model = loaded(grow(tiny_base, tmp_path / "larger", **LARGER)).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ids = torch.randint(0, model.config.vocabulary, (2, 20), generator=torch.Generator().manual_seed(1))
    for _ in range(3):  # writers first, then what they write from
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(
            logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        learns = parameter.grad != 0
        share = (learns[ids.flatten()] if "embed" in name else learns).float().mean()
        assert share > 0.95, (name, share)


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        (LARGER | {"width": 16}, "smaller"),
        (LARGER | {"layers": 1}, "smaller"),
        (LARGER | {"width": 40}, "no whole number"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_base: Path, tmp_path: Path, shape: dict[str, int], why: str
) -> None:
    with pytest.raises(Refused, match=why):
        grow(tiny_base, tmp_path / "larger", **shape)
    assert not (tmp_path / "larger").exists()


def test_other_architectures_are_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="plain Llama"):
        grow(make_checkpoint(tie_word_embeddings=False), tmp_path / "larger", **LARGER)
