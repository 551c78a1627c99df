"""What a member learns in a step: the log-probabilities its row speaks, of the data's answers or of a teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.build import Loaded
from heliostat.family import Row
from heliostat.model.seam import Causal
from heliostat.train.data import Batches, Example
from heliostat.train.sharing import Layout, lay_out, log_probabilities, speak, to_device

COLUMNS = 8
"""Batches are padded to a multiple of so many tokens: shapes that recur find their kernels compiled."""


@dataclass(frozen=True, slots=True)
class MemberMicro:
    """Some examples laid out for a row, ready to run."""

    layout: Layout
    row: Row
    modules: Mapping[str, Loaded]
    teacher: Loaded | None = None
    whole: Tensor | None = None  # [B, T] the examples' ids without their last token, for the teacher

    @property
    def spoken(self) -> int:
        return self.layout.spoken

    @property
    def tokens(self) -> int:
        return sum(self.layout.tokens.values()) + (self.whole.numel() if self.whole is not None else 0)

    def loss(self) -> Tensor:
        """Summed loss (nats): of the data's tokens, or from the teacher's distribution where there is a teacher."""
        logits = speak(self.layout, self.row, self.modules)
        if self.teacher is None:
            return -log_probabilities(logits, self.layout.targets).sum()
        return divergence(self._taught(), logits)

    def _taught(self) -> Tensor:
        """Logits [N, V] of the teacher, at the places where the row speaks."""
        assert self.teacher is not None and self.whole is not None
        positions = torch.arange(self.whole.shape[1], device=self.whole.device).expand_as(self.whole)
        with torch.no_grad():
            hidden = self.teacher.model(self.whole, positions, Causal(), self.teacher.route)
            example, position = self.layout.where.unbind(1)
            return self.teacher.model.logits(hidden[example, position]).float()


def divergence(taught: Tensor, logits: Tensor) -> Tensor:
    """Kullback-Leibler divergence (nats) from teacher to learner, both logits [N, V], summed over N."""
    return torch.nn.functional.kl_div(
        logits.log_softmax(-1), taught.log_softmax(-1), reduction="sum", log_target=True
    )


@dataclass(frozen=True, slots=True)
class MemberObjective:
    """Batches of examples, laid out for one row; the same step always sees the same ones."""

    batches: Batches
    accumulation: int
    row: Row
    modules: Mapping[str, Loaded]
    teacher: Loaded | None = None

    def micros(self, step: int) -> list[MemberMicro]:
        """The micro-batches of an optimizer step."""
        first = step * self.accumulation
        return [self.micro(self.batches.at(first + i)) for i in range(self.accumulation)]

    def micro(self, examples: Sequence[Example]) -> MemberMicro:
        """These examples as one micro-batch."""
        device = self.modules[self.row.speaker].model.device
        layout = to_device(lay_out(examples, self.row, multiple=COLUMNS), device)
        whole = _whole(examples).to(device) if self.teacher else None
        return MemberMicro(layout, self.row, self.modules, self.teacher, whole)


def _whole(examples: Sequence[Example]) -> Tensor:
    longest = max(len(example.ids) for example in examples) - 1
    return torch.tensor(
        [[*e.ids[:-1], *[0] * (longest + 1 - len(e.ids))] for e in examples], dtype=torch.long
    )


@torch.no_grad()
def evaluation_loss(
    examples: Sequence[Example], row: Row, modules: Mapping[str, Loaded], *, bf16: bool, batch_size: int = 32
) -> float:
    """Mean loss (nats an answer token) of the row on held-out examples."""
    total, count = 0.0, 0
    device = modules[row.speaker].model.device
    ordered = sorted(examples, key=lambda e: len(e.ids))
    for start in range(0, len(ordered), batch_size):
        layout = to_device(lay_out(ordered[start : start + batch_size], row), device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            spoken = log_probabilities(speak(layout, row, modules), layout.targets)
        total, count = total - float(spoken.sum()), count + layout.spoken
    return total / count
