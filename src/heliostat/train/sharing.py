"""Teacher-forced training of any row: which tokens go through which module, and the log-probabilities that are spoken.

Everything follows from the row. Positions below the boundary run through prompt_writer; where answer_writer is the
same module its pass simply goes on, else it reads the prompt's K,V and writes the answer's; where the speaker is
neither it reads both. No token runs through a module that the row does not ask for. Whether a pass carries
gradients is decided by whose parameters are being trained, not here. Earlier answers of a conversation are prompt to
later ones, as they are when serving.

The loss is SUN's (arXiv 2603.02599), PrefillShare's (arXiv 2602.12029) or ICaRus's (arXiv 2603.13281), by the row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.build import BASE, Loaded
from heliostat.errors import Refused
from heliostat.family import Row, sharing_named
from heliostat.linear.lora import adapted_linears
from heliostat.linear.paca import lift
from heliostat.model.mirror import mirrored
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


# --- a model of transformers, trained in a row ----------------------------------------------------------------

OWN = "own"
UNLEARNED = -100
"""The label of a token that carries no loss, as everywhere."""


def idle(name: str, row: Row, own: str) -> bool:
    """Whether a tensor of the member's own module is never used: who only speaks reads others' keys and values."""
    writes = own in (row.prompt_writer, row.answer_writer)
    return not writes and any(part in name for part in ("k_proj", "v_proj", "k_norm"))


def wrap(model: nn.Module, *, row: str | Row) -> InRow:
    """A causal LM of transformers that learns what it would say in a row: for their Trainer, or any loop of yours.

    ``row``: the name of a sharing, or a Row whose modules are "own" and "base". What ``model`` wears (paca.apply) is
    its own part and the rest the base's; a model without adapters is tuned in full, beside a frozen copy of it where
    the row needs one. Raises Refused for a model that heliostat does not run.
    """
    found = sharing_named(row).row if isinstance(row, str) else row
    if strange := sorted(set(found.modules) - {OWN, BASE}):
        raise Refused(
            f"row names {', '.join(strange)}: a model alone plays {OWN!r}, its untuned self {BASE!r}"
        )
    return InRow(model, found)


DROPPED = "branches_dropped"
"""Attribute of a transformers model whose branches `dropbp.wrap` drops."""


class InRow(nn.Module):
    """See ``wrap``. The model itself is ``model``: save that one."""

    accepts_loss_kwargs = True  # transformers' Trainer: the loss is divided by num_items_in_batch here

    def __init__(self, model: nn.Module, row: Row) -> None:
        super().__init__()
        if getattr(model, DROPPED, False):
            raise Refused(
                "dropbp.wrap was put on this model, and in a row it would drop nothing: undo it, or use heliostat train "
                "--sharing ... --dropbp ..."
            )
        ours = mirrored(model)
        self.model, self.row, self.config = model, row, model.config
        linears = adapted_linears(model)
        worn = sorted({str(m.worn) for m in linears.values() if m.worn is not None})
        if len(worn) > 1:
            raise Refused(f"the model wears {', '.join(worn)} at once: one adapter can be trained in a row")
        trained = [n for n, p in model.named_parameters() if p.requires_grad and ".adapters." in n]
        if unused := [name for name in trained if idle(name, row, OWN)]:
            raise Refused(
                f"{unused[0]} is tuned, but in this row the member writes no keys or values: leave it out"
            )
        if worn and not row.alone:
            lift(model, worn[0])  # its weights are the base's, too
        own = Loaded(OWN, "", BASE, ours, worn[0] if worn else None)
        base = own if worn else None
        if not worn:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and not idle(name, row, OWN))
            if BASE in row.modules:
                base = Loaded(BASE, "", BASE, mirrored(model, copied=True))
        self.modules_of_row = {OWN: own} | ({BASE: replace(base, adapter=None)} if base is not None else {})

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **other: Any,
    ) -> dict[str, Tensor]:
        """The mean loss of what is spoken, as ``loss``: of each run of ``labels`` [B, T] (int64) that are not -100.

        Each such run is an answer, everything before it its prompt. ``input_ids`` [B, T], padded on the right.
        """
        examples = labelled(input_ids, attention_mask, labels)
        layout = to_device(lay_out(examples, self.row), input_ids.device)
        for loaded in self.modules_of_row.values():
            if (
                loaded.model.device != input_ids.device
            ):  # the copy, and what is computed, are nobody's parameters
                loaded.model.to(input_ids.device)
            loaded.model.frequencies = loaded.model.frequencies.to(input_ids.device)
        spoken = log_probabilities(speak(layout, self.row, self.modules_of_row), layout.targets)
        return {
            "loss": -spoken.sum() / (num_items_in_batch if num_items_in_batch is not None else layout.spoken)
        }

    def __getattr__(self, name: str) -> Any:
        """What is not the row's is the model's: trainers look for more than a module has (``generation_config`` ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet
                raise
            return getattr(self.model, name)

    def gradient_checkpointing_enable(self, *_: Any, **__: Any) -> None:
        """Compute activations again in the backward pass (transformers' name for it)."""
        for loaded in self.modules_of_row.values():
            loaded.model.checkpointing = True

    activation_checkpointing_enable = gradient_checkpointing_enable


def labelled(ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None) -> list[Example]:
    """Examples out of a batch as transformers makes it; rows that teach nothing are left out."""
    if labels is None:
        raise Refused("no labels: give the batch's labels, -100 where nothing is learned")
    lengths = [ids.shape[1]] * len(ids) if attention_mask is None else attention_mask.sum(1).tolist()
    if attention_mask is not None and not attention_mask[:, 0].all():
        raise Refused(
            "the batch is padded on the left: pad on the right, so that positions are those of serving"
        )
    found = []
    for row, said, length in zip(ids.tolist(), labels.tolist(), lengths, strict=True):
        answers = tuple(_runs(said[:length]))
        if answers:
            found.append(Example(tuple(row[: answers[-1][1]]), answers))
    if not found:
        raise Refused(
            "no label of this batch is other than -100, or only a first token's: there is nothing to learn"
        )
    return found


def _runs(labels: Sequence[int]) -> Iterable[tuple[int, int]]:
    """[start, stop) of each run of labels that are learned; nothing stands before a first token, so it is not."""
    learned = [place for place in range(1, len(labels)) if labels[place] != UNLEARNED]
    for _, places in groupby(enumerate(learned), lambda pair: pair[1] - pair[0]):
        run = [place for _, place in places]
        yield run[0], run[-1] + 1
