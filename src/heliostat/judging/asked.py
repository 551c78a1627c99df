"""Whom a judge is made for: the row that answers, the draft beside it, and the prompts, all checked before anything runs."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heliostat.build import (
    Loaded,
    best_dtype,
    load_modules,
    load_tokenizer,
    read_family,
    verify_member,
)
from heliostat.engine.speculation.loading import reads_pages, refuse_other_tokens
from heliostat.errors import Refused
from heliostat.family import Family, Row
from heliostat.judging.consequences import Question
from heliostat.llm import LLM
from heliostat.train.formats import scan
from heliostat.train.teacher import questions

CACHE_MIB = 512
"""Most memory for the pages of the answers."""
LEAST_PROMPTS = 5
HELD_OUT = 0.2
"""Share of the prompts that nothing is fitted on: theta is chosen by them."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A row that answers, and the draft whose tokens are judged, in memory."""

    folder: Path
    family: Family
    member: str
    """Whose row it is, or the speaker's own name."""
    row: Row
    draft: Loaded
    modules: Mapping[str, Loaded]
    llm: LLM
    longest: int
    """Tokens of a prompt and its answer, at most."""
    reads: bool = False
    """Whether the draft reads the speaker's keys and values."""

    @property
    def speaker(self) -> Loaded:
        return self.modules[self.row.speaker]

    @property
    def digests(self) -> dict[str, str]:
        """Of all that labels hang on, by part."""
        return {name: self.modules[name].digest for name in self.row.modules} | {"draft": self.draft.digest}


def load_pair(
    folder: Path, speaker: str, draft: str, *, member: str | None = None, dtype: torch.dtype | None = None
) -> Pair:
    """Row and draft of a family. Refused where the speaker does not speak for the member, or the draft has other tokens."""
    folder = Path(folder)
    family = read_family(folder)
    row = _row(folder, family, speaker, member)
    if draft == speaker:
        raise Refused(
            f"speaker and draft are both {speaker!r}: a draft must be a smaller module of the family"
        )
    tokenizer = load_tokenizer(folder, family)
    refuse_other_tokens(folder, family, draft, tokenizer)
    kind = best_dtype() if dtype is None else dtype
    loaded = load_modules(folder, family, [*row.modules, draft], dtype=kind, joined=True)
    modules = {name: loaded[name] for name in row.modules}
    who = member or speaker
    llm = LLM.of(modules, {who: row}, tokenizer, cache_mib=CACHE_MIB)
    longest = min(llm.engine.max_length, loaded[draft].model.config.max_length)
    reads = reads_pages(family, draft)
    return Pair(folder, family, who, row, loaded[draft], modules, llm, longest, reads)


def _row(folder: Path, family: Family, speaker: str, member: str | None) -> Row:
    family.module(speaker)
    if member is None:
        return Row(speaker, speaker, speaker, speaker)
    row = family.row(member)
    if row.speaker != speaker:
        raise Refused(
            f"{row.speaker!r} speaks for member {member!r}, not {speaker!r}: say --speaker {row.speaker}"
        )
    if member in family.members:
        verify_member(family, member, folder=folder)
    return row


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts in the order of chance: those to learn from, and those held out."""

    learned: tuple[Question, ...]
    held_out: tuple[Question, ...]
    too_long: int
    """Left out, because they are longer than the models read."""

    @property
    def all(self) -> tuple[Question, ...]:
        return self.learned + self.held_out


def read_asked(data: Path, pair: Pair, *, most: int | None, seed: int) -> Asked:
    """The prompts of a jsonl file of any kind that ``train`` reads, answers where it has any.

    At most ``most``, drawn by ``seed``. Refused for bad lines, and where there are fewer than LEAST_PROMPTS.
    """
    found = questions(data, pair.llm.tokenizer, max_length=pair.longest, skip_bad=False, too_long="skip")
    answers = {r.line: r.answer for r in scan(data).records if r.answer is not None}
    made = [Question(line, tuple(ids), answers.get(line)) for line, ids in found.prompts]
    random.Random(f"judge/{seed}").shuffle(made)
    made = made[:most]
    if len(made) < LEAST_PROMPTS:
        raise Refused(f"{data} has {len(made)} prompts that fit; a judge needs at least {LEAST_PROMPTS}")
    held = max(1, round(HELD_OUT * len(made)))
    return Asked(tuple(made[:-held]), tuple(made[-held:]), len(found.too_long))


def identity(pair: Pair, data: Path, *, suffix: int, metric: str, longest: int) -> dict[str, Any]:
    """All that labels hang on."""
    return {
        "row": {
            part: getattr(pair.row, part)
            for part in ("prompt_writer", "answer_writer", "speaker", "first_speaker")
        },
        "digests": pair.digests,
        **({"draft_reads": "the speaker's keys and values"} if pair.reads else {}),
        "dtype": str(pair.speaker.model.dtype),
        "data": hashlib.sha256(Path(data).read_bytes()).hexdigest(),
        "suffix": suffix,
        "metric": metric,
        "longest": longest,
    }


def in_groups(questions: Sequence[Question], size: int) -> list[Sequence[Question]]:
    """``size`` of them at a time."""
    return [questions[at : at + size] for at in range(0, len(questions), size)]
