"""What a member learns in a step: the log-probabilities its row speaks, of the data's answers or of a teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from heliostat.build import Loaded
from heliostat.family import Row
from heliostat.model.seam import Causal
from heliostat.model.transformer import Tape
from heliostat.train.data import Batches, Example
from heliostat.train.distil import divergence
from heliostat.train.dropbp import Dropping
from heliostat.train.ranks import ALONE, Ranks
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
    idle: bool = False
    """Runs with the others, as parted modules must, and teaches nothing: its process has no part of the batch."""

    @property
    def spoken(self) -> int:
        return 0 if self.idle else self.layout.spoken

    @property
    def tokens(self) -> int:
        if self.idle:
            return 0
        return sum(self.layout.tokens.values()) + (self.whole.numel() if self.whole is not None else 0)

    def loss(self) -> Tensor:
        """Summed loss (nats): of the data's tokens, or from the teacher's distribution where there is a teacher."""
        logits = speak(self.layout, self.row, self.modules)
        if self.idle:
            return 0.0 * logits.sum()
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


@dataclass(frozen=True, slots=True)
class Learner:
    """Who is trained: a module of the row, by these parameters, and how its branches are dropped."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    dropping: Dropping
    bf16: bool


@dataclass(frozen=True, slots=True)
class MemberObjective:
    """Batches of examples, laid out for one row; the same step always sees the same ones."""

    batches: Batches
    accumulation: int
    row: Row
    modules: Mapping[str, Loaded]
    teacher: Loaded | None = None
    learner: Learner | None = None
    """Given where branches of the backward pass are dropped."""
    ranks: Ranks = ALONE

    def micros(self, step: int) -> list[MemberMicro]:
        """The micro-batches of an optimizer step; one draw of branches serves them all."""
        first = step * self.accumulation
        tape = self._tape(step, self.batches.at(first)[:1])
        return [self._shared(self.batches.at(first + i), tape) for i in range(self.accumulation)]

    def _shared(self, examples: Sequence[Example], tape: Tape | None) -> MemberMicro:
        """This process's part of a batch; one without a part runs the first example for nothing."""
        own = self.ranks.share(examples)
        return self.micro(own, tape) if own else replace(self.micro(examples[:1], tape), idle=True)

    def _tape(self, step: int, example: Sequence[Example]) -> Tape | None:
        learner = self.learner
        if learner is None:
            return None

        def losing(tape: Tape | None) -> Tensor:
            micro = self.micro(example, tape)
            with torch.autocast(micro.layout.prompt.device.type, dtype=torch.bfloat16, enabled=learner.bf16):
                return micro.loss() / micro.spoken

        return learner.dropping.tape(step, losing, learner.parameters)

    def micro(self, examples: Sequence[Example], tape: Tape | None = None) -> MemberMicro:
        """These examples as one micro-batch; ``tape``: the learner's branches that carry gradient."""
        modules = self.modules
        if self.learner is not None:
            own = self.learner.name
            modules = {**modules, own: replace(modules[own], tape=tape)}
        device = self.modules[self.row.speaker].model.device
        layout = to_device(lay_out(examples, self.row, multiple=COLUMNS), device)
        whole = _whole(examples).to(device) if self.teacher else None
        return MemberMicro(layout, self.row, modules, self.teacher, whole)


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
