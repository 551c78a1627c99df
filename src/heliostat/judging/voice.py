"""A row over one text, its keys and values kept: what it says at every place, and what it would had a token been another.

Another token costs a pass over itself and what follows it, not over what stands before it: that is read where it lies.
Whole sequences, any number format; the engine serves the same row over pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.build import Loaded
from heliostat.family import Row
from heliostat.model.seam import Causal, KeyValues, Reading, Recording

TOGETHER = 8192
"""Tokens of kept text and of what follows, over all other tokens that run in one pass."""


@dataclass(frozen=True, slots=True)
class Other:
    """A token in place of the answer's own, and what follows it all the same."""

    place: int
    """In the answer."""
    token: int
    suffix: tuple[int, ...]
    """The answer's own next tokens."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What the row makes of other tokens."""

    hidden: Tensor
    """[M, E]: the speaker's last state where each of them is the input."""
    suffixes: Tensor
    """[M]: log-probability (nats) of each one's suffix behind it; 0 where that is empty."""


class Voice:
    """What a row says over a prompt and an answer. It runs each of them once, and keeps what the writers wrote."""

    def __init__(
        self, row: Row, modules: Mapping[str, Loaded], prompt: Sequence[int], answer: Sequence[int]
    ) -> None:
        self.row, self.modules = row, modules
        self.prompt, self.answer = tuple(prompt), tuple(answer)
        self.boundary = row.boundary(len(prompt))
        self.speaker = modules[row.speaker]
        device = self.speaker.model.device
        ids = torch.tensor([*prompt, *answer], device=device)[None]
        positions = torch.arange(ids.shape[1], device=device)[None]
        written: list[KeyValues] = []
        chooses: list[Tensor] = []
        if self.boundary:
            recording, head = Recording(Causal()), slice(0, self.boundary)
            before = modules[row.prompt_writer].run(ids[:, head], positions[:, head], recording)
            written.append(recording.written)
            if self.boundary == len(prompt) and row.speaker == row.prompt_writer:
                chooses.append(before[0, -1:])
        rest = slice(self.boundary, None)
        mask = positions[0] <= positions[0, rest, None]  # [T - boundary, T]
        hidden, own = self._run(ids[:, rest], positions[:, rest], written, mask[None, None])
        self.written = _laid_end_to_end([*written, own])
        self.states = torch.cat([*chooses, hidden[0, :-1]])
        """[answer - first, E]: the speaker's, each of which chooses one token of the answer."""

    @property
    def first(self) -> int:
        """The first token of the answer that the speaker chooses: 1 where the prompt's writer, another module, begins."""
        return len(self.answer) - len(self.states)

    def logprobs(self, tokens: Sequence[int]) -> Tensor:
        """Log-probability [answer] (nats) of one token at every place of the answer; nan where another module speaks."""
        said = _log_softmax(self.speaker.model.logits(self.states))
        wanted = torch.tensor(tokens[self.first :], dtype=torch.int64, device=said.device)[:, None]
        return torch.cat([said.new_full((self.first,), torch.nan), said.gather(1, wanted)[:, 0]])

    def hear(self, others: Sequence[Other]) -> Heard:
        """What the row makes of each of ``others``; several run in one pass, over the keys and values that are there."""
        longest = max((len(other.suffix) for other in others), default=0)
        few = max(1, TOGETHER // (len(self.prompt) + len(self.answer) + max(1, longest)))
        heard = [self._hear(others[at : at + few]) for at in range(0, len(others), few)]
        empty = self.states.new_zeros(0, self.states.shape[1])
        return Heard(
            torch.cat([empty, *(one.hidden for one in heard)]),
            torch.cat([_log_softmax(empty[:, :1])[:, 0], *(one.suffixes for one in heard)]),
        )

    def _hear(self, others: Sequence[Other]) -> Heard:
        device, length = self.states.device, max(1, *(len(other.suffix) for other in others))
        # The last token of a suffix is asked for and never read.
        rows = [[other.token, *other.suffix[:-1]] for other in others]
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)  # [M, S]
        starts = torch.tensor([len(self.prompt) + other.place for other in others], device=device)
        steps = torch.arange(length, device=device)
        kept = torch.arange(len(self.prompt) + len(self.answer), device=device)
        before = (kept < starts[:, None])[:, None].expand(-1, length, -1)  # [M, S, T]
        own = (steps <= steps[:, None]).expand(len(others), -1, -1)  # [M, S, S]
        written = {
            layer: (k.expand(len(others), -1, -1, -1), v.expand(len(others), -1, -1, -1))
            for layer, (k, v) in self.written.items()
        }
        mask = torch.cat([before, own], dim=2)[:, None]
        hidden, _ = self._run(ids, starts[:, None] + steps, [written], mask)
        return Heard(hidden[:, 0], self._suffixes(hidden, others))

    def _suffixes(self, hidden: Tensor, others: Sequence[Other]) -> Tensor:
        rows = [n for n, other in enumerate(others) for _ in other.suffix]
        columns = [n for other in others for n in range(len(other.suffix))]
        wanted = torch.tensor([token for other in others for token in other.suffix], device=hidden.device)
        said = _log_softmax(self.speaker.model.logits(hidden[rows, columns]))
        total = said.new_zeros(len(others))
        if len(wanted):
            total.index_add_(
                0, torch.tensor(rows, device=hidden.device), said.gather(1, wanted[:, None])[:, 0]
            )
        return total

    def _run(
        self, ids: Tensor, positions: Tensor, sources: Sequence[KeyValues], mask: Tensor
    ) -> tuple[Tensor, KeyValues]:
        """The speaker's states of tokens behind the boundary, and what their writer wrote of them."""
        recording = Recording(Reading(sources, mask, own=True))
        hidden = self.modules[self.row.answer_writer].run(ids, positions, recording)
        if self.row.two_rows:
            reading = Reading([*sources, recording.written], mask, own=False)
            hidden = self.speaker.run(ids, positions, reading)
        return hidden, recording.written


def top_tokens(draft: Loaded, prompt: Sequence[int], answer: Sequence[int], *, vocabulary: int) -> list[int]:
    """The draft's likeliest token at every place of the answer, of those below ``vocabulary``, from one pass."""
    ids = torch.tensor([*prompt, *answer], device=draft.model.device)[None]
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    hidden = draft.run(ids, positions, Causal())[0, len(prompt) - 1 : -1]
    best: list[int] = draft.model.logits(hidden)[:, :vocabulary].argmax(-1).tolist()
    return best


def top_tokens_over(voice: Voice, draft: Loaded, *, vocabulary: int) -> list[int]:
    """As ``top_tokens``, of a draft that reads the speaker's keys and values of what stands before, as its twin does."""
    tokens = torch.tensor([*voice.prompt, *voice.answer], device=draft.model.device)
    said, best = len(tokens), list[int]()
    kept = torch.arange(said, device=tokens.device)
    for places in kept[len(voice.prompt) - 1 : -1].split(max(1, TOGETHER // said)):
        before = kept < places[:, None]
        mask = torch.cat([before, before.new_ones(len(places), 1)], dim=1)[:, None, None]  # [A, 1, 1, T + 1]
        written = {
            layer: (k.expand(len(places), -1, -1, -1), v.expand(len(places), -1, -1, -1))
            for layer, (k, v) in voice.written.items()
        }
        hidden = draft.run(tokens[places, None], places[:, None], Reading([written], mask, own=True))[:, 0]
        best += draft.model.logits(hidden)[:, :vocabulary].argmax(-1).tolist()
    return best


def _laid_end_to_end(parts: Sequence[KeyValues]) -> KeyValues:
    """Keys and values of parts of one text, in the number format of the last, which is the speaker's side of it."""
    last = parts[-1]
    return {
        layer: (
            torch.cat([part[layer][0].to(k.dtype) for part in parts], dim=1),
            torch.cat([part[layer][1].to(v.dtype) for part in parts], dim=1),
        )
        for layer, (k, v) in last.items()
    }


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32, or in float64 where the model is."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1)
