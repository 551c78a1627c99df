"""Teacher-forced training of any row: which tokens go through which module, and the log-probabilities that are spoken.

Everything follows from the row. Positions below the boundary run through prompt_writer; where answer_writer is the
same module its pass simply goes on, else it reads the prompt's K,V and writes the answer's; where the speaker is
neither it reads both. No token runs through a module that the row does not ask for. Whether a pass carries
gradients is decided by whose parameters are being trained, not here. Earlier answers of a conversation are prompt to
later ones, as they are when serving.

The loss is SUN's (arXiv 2603.02599), PrefillShare's (arXiv 2602.12029) or ICaRus's (arXiv 2603.13281), by the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heliostat.build import Loaded
from heliostat.family import Row
from heliostat.model.seam import Causal, KeyValues, Reading, Recording
from heliostat.train.data import Example

RECURRING = 64
"""Spoken tokens are padded to a multiple of so many rows before the head."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Padded index tensors of the answer passes. Q: positions of all answers of one example, padded."""

    ids: Tensor  # [B, Q] token ids
    positions: Tensor  # [B, Q]
    starts: Tensor  # [B, Q] boundary of the position's answer; 0 on padding
    number: Tensor  # [B, Q] which answer of the example; -1 on padding


@dataclass(frozen=True, slots=True)
class Layout:
    """One batch laid out for one row. T: tokens of the prompt_writer's pass, N: spoken tokens."""

    prompt: Tensor  # [B, T] token ids
    answers: Answers | None
    from_prompt: tuple[Tensor, Tensor]  # (example, position) of hidden states of the prompt pass that speak
    from_answers: tuple[Tensor, Tensor]  # (example, column of Answers) that speak
    targets: Tensor  # [N] token ids: those spoken by the prompt pass, then those by the answer pass
    where: Tensor  # [N, 2] (example, position) of the state that speaks each target
    tokens: Mapping[str, int]  # tokens that each module runs, padding left out

    @property
    def spoken(self) -> int:
        """Number of tokens that carry loss."""
        return int(self.targets.numel())


def lay_out(examples: Sequence[Example], row: Row, *, multiple: int = 1) -> Layout:
    """Index tensors for a batch of examples under a row (see Layout), padded to a multiple of so many columns."""
    goes_on = row.answer_writer == row.prompt_writer
    one_voice = goes_on and row.speaker == row.prompt_writer
    prompts, spans, said, said_later = [], [], [], []
    for number, example in enumerate(examples):
        bounds = [(row.boundary(start), start, stop) for start, stop in example.answers]
        stop = example.answers[-1][1] - 1 if goes_on else bounds[-1][0]
        prompts.append(example.ids[:stop])
        columns: list[tuple[int, int, int, int]] = []
        for answer, (boundary, start, end) in enumerate(bounds):
            for position in range(start - 1, end - 1):
                if position < boundary or one_voice:
                    said.append((number, position, example.ids[position + 1]))
                else:
                    said_later.append((number, len(columns), example.ids[position + 1], position))
                    columns.append((example.ids[position], position, boundary, answer))
        spans.append(columns)
    return Layout(
        prompt=_padded(prompts, multiple),
        answers=None if one_voice else _answers(spans, multiple),
        from_prompt=_pairs([(b, p) for b, p, _ in said]),
        from_answers=_pairs([(b, c) for b, c, _, _ in said_later]),
        targets=torch.tensor([t for *_, t in said] + [t for _, _, t, _ in said_later], dtype=torch.long),
        where=torch.tensor(
            [(b, p) for b, p, _ in said] + [(b, p) for b, _, _, p in said_later], dtype=torch.long
        ).view(-1, 2),
        tokens=_tokens(row, sum(map(len, prompts)), sum(map(len, spans)), one_voice=one_voice),
    )


def _tokens(row: Row, prompt: int, answers: int, *, one_voice: bool) -> dict[str, int]:
    counts = {row.prompt_writer: prompt}
    if row.answer_writer != row.prompt_writer:
        counts[row.answer_writer] = counts.get(row.answer_writer, 0) + answers
    if not one_voice and row.speaker != row.answer_writer:
        counts[row.speaker] = counts.get(row.speaker, 0) + answers
    return counts


def speak(layout: Layout, row: Row, modules: Mapping[str, Loaded]) -> Tensor:
    """Logits [N, V] (float32) that choose the layout's targets, each by the module that speaks there."""
    writer = modules[row.prompt_writer]
    written, hidden = _prompt_pass(layout, writer)
    spoken = []
    if layout.from_prompt[0].numel():
        spoken.append(_logits(writer, hidden[layout.from_prompt]))
    if layout.answers is not None and layout.from_answers[0].numel():
        speaker = modules[row.speaker]
        later = _answer_passes(layout.answers, row, modules, written, layout.prompt.shape[1])
        spoken.append(_logits(speaker, later[layout.from_answers]))
    return torch.cat([part.float() for part in spoken])


def _logits(speaker: Loaded, hidden: Tensor) -> Tensor:
    """Logits [N, V] of hidden states [N, E], run in a few recurring shapes: a CPU compiles its kernels for each."""
    count = hidden.shape[0]
    return speaker.model.logits(torch.nn.functional.pad(hidden, (0, 0, 0, -count % RECURRING)))[:count]


def _prompt_pass(layout: Layout, writer: Loaded) -> tuple[KeyValues, Tensor]:
    """K,V and hidden states [B, T, E] of the prompt_writer over its positions."""
    ids = layout.prompt
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if layout.answers is None:
        return {}, writer.run(ids, positions, Causal())
    recording = Recording(Causal())
    hidden = writer.run(ids, positions, recording)
    return recording.written, hidden


def _answer_passes(
    answers: Answers, row: Row, modules: Mapping[str, Loaded], written: KeyValues, prompt: int
) -> Tensor:
    """Hidden states [B, Q, E] of the speaker over the answers' positions."""
    if (
        row.answer_writer == row.prompt_writer
    ):  # everything is written already, the answers' own positions too
        reading = Reading([written], sees_all(answers, prompt), own=False)
        return _run(modules[row.speaker], answers, reading)
    sees = torch.cat([sees_prompt(answers, prompt), sees_answer(answers)], dim=-1)
    if row.speaker == row.answer_writer:
        return _run(modules[row.speaker], answers, Reading([written], sees, own=True))
    recording = Recording(Reading([written], sees, own=True))
    _run(modules[row.answer_writer], answers, recording)
    return _run(modules[row.speaker], answers, Reading([written, recording.written], sees, own=False))


def _run(module: Loaded, answers: Answers, seam: Reading | Recording) -> Tensor:
    return module.run(answers.ids, answers.positions, seam)


def sees_all(answers: Answers, prompt: int) -> Tensor:
    """[B, 1, Q, T]: a query sees every position of the one writer up to its own."""
    return (torch.arange(prompt, device=answers.ids.device) <= answers.positions[..., None])[:, None]


def sees_prompt(answers: Answers, prompt: int) -> Tensor:
    """[B, 1, Q, T]: a query sees what prompt_writer wrote below the boundary of its answer."""
    return (torch.arange(prompt, device=answers.ids.device) < answers.starts[..., None])[:, None]


def sees_answer(answers: Answers) -> Tensor:
    """[B, 1, Q, Q]: a query sees its own answer up to itself; padding sees itself, so that no row is empty."""
    same = answers.number[:, :, None] == answers.number[:, None, :]
    earlier = answers.positions[:, None, :] <= answers.positions[:, :, None]
    itself = torch.eye(answers.ids.shape[1], dtype=torch.bool, device=answers.ids.device)
    return ((same & earlier & (answers.number >= 0)[:, None, :]) | itself)[:, None]


def log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Natural log-probability [N] of each target under logits [N, V] (float32)."""
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def to_device(layout: Layout, device: torch.device) -> Layout:
    """The same layout with its tensors on ``device``."""
    if device.type == "cpu":
        return layout
    answers = layout.answers
    if answers is not None:
        fields = (answers.ids, answers.positions, answers.starts, answers.number)
        answers = Answers(*(field.to(device) for field in fields))
    return replace(
        layout,
        prompt=layout.prompt.to(device),
        answers=answers,
        from_prompt=(layout.from_prompt[0].to(device), layout.from_prompt[1].to(device)),
        from_answers=(layout.from_answers[0].to(device), layout.from_answers[1].to(device)),
        targets=layout.targets.to(device),
        where=layout.where.to(device),
    )


def _answers(spans: list[list[tuple[int, int, int, int]]], multiple: int) -> Answers | None:
    if not any(spans):
        return None
    ids, positions, starts, numbers = (
        _padded([[c[i] for c in columns] for columns in spans], multiple) for i in range(4)
    )
    lengths = torch.tensor([len(columns) for columns in spans])
    padding = torch.arange(ids.shape[1]) >= lengths[:, None]
    return Answers(ids, positions, starts, numbers.masked_fill(padding, -1))


def _padded(rows: Sequence[Sequence[int]], multiple: int) -> Tensor:
    longest = -(-max(1, max(map(len, rows))) // multiple) * multiple
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long)


def _pairs(pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    both = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    return both[:, 0], both[:, 1]
