"""Learning plain text: packed rows of documents, the next token everywhere but across a border."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.errors import Refused
from heliostat.model.seam import Masked
from heliostat.model.transformer import Transformer
from heliostat.train.distil import Teacher
from heliostat.train.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Documents laid end to end and cut into rows. T: tokens a row."""

    ids: Tensor  # [N, T] token ids
    documents: Tensor  # [N, T] number of the document each token belongs to
    positions: Tensor  # [N, T] place of each token within its part of the document in this row

    @classmethod
    def of(cls, documents: Sequence[Sequence[int]], length: int) -> PackedRows:
        """Rows of ``length`` tokens; a document that crosses a border goes on in the next row; the rest is left out."""
        lengths = torch.tensor([len(d) for d in documents])
        tokens = array("i")
        for document in documents:
            tokens.extend(document)
        flat = torch.frombuffer(tokens, dtype=torch.int32) if tokens else torch.zeros(0, dtype=torch.int32)
        count = flat.numel() // length
        if count == 0:
            raise Refused(f"the text has {flat.numel()} tokens, less than one row of max_length {length}")
        numbers = torch.repeat_interleave(torch.arange(len(documents), dtype=torch.int32), lengths)
        ids, numbers = (t[: count * length].view(count, length) for t in (flat, numbers))
        return cls(ids, numbers, _places(numbers))


def _places(numbers: Tensor) -> Tensor:
    """Position of each token since its document began in the row, [N, T] int32."""
    places = torch.arange(numbers.shape[1]).expand_as(numbers)
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return (places - (places * begins).cummax(dim=1).values).to(torch.int32)


@dataclass(frozen=True, slots=True)
class TextMicro:
    """Some rows and the model that learns them."""

    model: Transformer
    ids: Tensor  # [B, T]
    documents: Tensor  # [B, T]
    positions: Tensor  # [B, T]
    teacher: Teacher | None = None

    @property
    def inside(self) -> Tensor:
        """[B, T-1]: whether the next token belongs to the same document."""
        return self.documents[:, 1:] == self.documents[:, :-1]

    @property
    def spoken(self) -> int:
        return int(self.inside.sum())

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    def loss(self) -> Tensor:
        """Summed negative log-likelihood of the next tokens (nats), with a teacher mixed with what it says of them."""
        logits, targets = self._said(self.model), self.ids.long()[:, 1:][self.inside]
        if self.teacher is None:
            return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        with torch.no_grad():
            taught = self._said(self.teacher.model)
        return self.teacher.loss(logits, targets, taught)

    def _said(self, model: Transformer) -> Tensor:
        """A model's logits [N, V] float32 wherever a next token is to be said; no document sees another."""
        hidden = model(self.ids.long(), self.positions, Masked.documents(self.documents))
        return model.logits(hidden[:, :-1][self.inside]).float()


@dataclass(slots=True)
class TextObjective:
    """Rows in a seeded order, epoch after epoch; the same step always sees the same rows."""

    model: Transformer
    rows: PackedRows
    batch: int
    accumulation: int
    seed: int
    teacher: Teacher | None = None
    ranks: Ranks = ALONE

    def micros(self, step: int) -> list[TextMicro]:
        """The ``accumulation`` micro-batches of ``batch`` rows of a step; of several processes each has its own."""
        size = self.batch * self.accumulation
        together = size * self.ranks.count
        picked = self._order(step * together, together)[self.ranks.number :: self.ranks.count]
        return [self._micro(picked[i : i + self.batch]) for i in range(0, size, self.batch)]

    def _micro(self, part: Tensor) -> TextMicro:
        rows, device = self.rows, self.model.device
        ids, documents, positions = (t[part].to(device) for t in (rows.ids, rows.documents, rows.positions))
        return TextMicro(self.model, ids, documents, positions, self.teacher)

    def _order(self, start: int, size: int) -> Tensor:
        count, picked = self.rows.ids.shape[0], []
        while size > 0:
            epoch, offset = divmod(start, count)
            order = torch.randperm(
                count, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            )
            taken = order[offset : offset + size]
            picked.append(taken)
            start, size = start + len(taken), size - len(taken)
        return torch.cat(picked)


@torch.no_grad()
def text_loss(model: Transformer, rows: PackedRows, *, batch: int = 32) -> float:
    """Mean loss (nats a token) of held-out rows."""
    total, count = 0.0, 0
    for start in range(0, rows.ids.shape[0], batch):
        part = slice(start, start + batch)
        held = (rows.ids[part], rows.documents[part], rows.positions[part])
        ids, documents, positions = (t.to(model.device) for t in held)
        micro = TextMicro(model, ids, documents, positions)
        total, count = total + float(micro.loss()), count + micro.spoken
    return total / count
