"""Learning the distribution of a teacher beside the text: both say every next token, the teacher frozen.

Loss of a token: (1 - weight) times the negative log-likelihood of the text, plus weight times temperature squared times
the divergence from teacher to learner, both at that temperature (Hinton, Vinyals and Dean, arXiv 1503.02531: the square
keeps the gradient's size as the temperature changes).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from heliostat.errors import Refused
from heliostat.model.config import read_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.model.weights import (
    checkpoint_facts,
    digest_tensors,
    load_transformer,
    read_tensors,
    weight_files,
)

NOT_TEXT = "chat template"
"""Of a tokenizer's parts the one that plain text never meets."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A frozen model and how much of the loss is its."""

    model: Transformer
    weight: float
    temperature: float
    digest: str
    """SHA-256 (hex) of its weights and config."""

    def loss(self, logits: Tensor, targets: Tensor, taught: Tensor) -> Tensor:
        """Summed loss (nats) of ``targets`` [N], from logits [N, V] of the learner and of the teacher (``taught``)."""
        own = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        apart = divergence(taught / self.temperature, logits / self.temperature)
        return (1 - self.weight) * own + self.weight * self.temperature**2 * apart


def divergence(taught: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence (nats) from teacher to learner, both logits [N, V], summed over N."""
    return torch.nn.functional.kl_div(
        logits.log_softmax(-1), taught.log_softmax(-1), reduction="sum", log_target=True
    )


def load_teacher(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    weight: float,
    temperature: float,
    dtype: torch.dtype,
    device: str,
    length: int,
) -> Teacher:
    """The model in ``folder`` as a teacher; refused where its tokenizer is not the learner's or its texts are shorter."""
    _refuse_other_tokenizer(folder, tokenizer)
    config = read_config(folder)
    if config.max_length < length:
        raise Refused(f"teacher {folder} reads {config.max_length} tokens; max_length is {length}: lower it")
    model = load_transformer(folder, config, dtype=dtype, device=device).requires_grad_(False)
    digest = digest_tensors(read_tensors(weight_files(folder)), checkpoint_facts(folder))
    return Teacher(model, weight, temperature, digest)


def _refuse_other_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    theirs = Tokenizer.load(folder)
    apart = [
        what for what, digest in tokenizer.parts.items() if digest != theirs.parts[what] and what != NOT_TEXT
    ]
    if apart:
        raise Refused(
            f"teacher {folder} has another tokenizer ({', '.join(apart)} differ), so its next tokens are not the "
            "learner's: leave tokenizer out to take the teacher's"
        )
