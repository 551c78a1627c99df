"""A run's preparation: recipe, data and family become a job, with everything in memory that it trains or needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heliostat.build import (
    BASE,
    RUNS,
    Loaded,
    best_dtype,
    config_of,
    device_named,
    load_modules,
    load_tokenizer,
    read_family,
    verify_module,
)
from heliostat.errors import Refused
from heliostat.family import Family, Row, own_module_name
from heliostat.model.config import ModelConfig
from heliostat.model.tokenizer import Tokenizer
from heliostat.train.adapting import adapt, kept_columns
from heliostat.train.data import Batches, Example, Examples, read_examples
from heliostat.train.dropbp import UNIFORM_SHARE, Dropping, branches_of
from heliostat.train.formats import Record, read_jsonl
from heliostat.train.objective import Learner, MemberObjective
from heliostat.train.ranks import ALONE, Ranks
from heliostat.train.recipe import Recipe, Settled
from heliostat.train.sharing import idle
from heliostat.train.teacher import taught_examples
from heliostat.train.track import check_tracker

JUDGED = 256
"""Held-out examples whose loss is measured during a run."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a run needs, in memory."""

    folder: Path
    family: Family
    recipe: Settled
    tokenizer: Tokenizer
    row: Row
    own: str
    modules: Mapping[str, Loaded]
    parameters: Mapping[str, nn.Parameter]
    examples: tuple[Example, ...]
    skipped: int
    """Lines of the data that were left out."""
    held_out: tuple[Example, ...]
    questions: tuple[Record, ...]
    """Held-out records whose answers are graded in the course of the run."""
    teacher: Loaded | None
    steps: int
    ranks: Ranks = ALONE

    @property
    def run_folder(self) -> Path:
        """Checkpoints, log, picture and recipe of this run."""
        return self.folder / RUNS / self.recipe.member

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    @property
    def total(self) -> int:
        """Parameters of all modules in memory, shared weights once."""
        models = {id(m.model): m.model for m in self.modules.values()}
        return sum(p.numel() for model in models.values() for p in model.parameters())


def prepare(recipe: Recipe, *, ranks: Ranks = ALONE, echo: Callable[[str], None] = lambda line: None) -> Job:
    """Read, check and load everything; refuses what cannot work, with the reason, before any training.

    With several processes the modules are parted among them, if the recipe says so.
    """
    folder = Path(recipe.family)
    family = read_family(folder)
    config, tokenizer = config_of(folder, family), load_tokenizer(folder, family)
    settled = settle(recipe, config)
    own = own_module_name(recipe.member, family.modules)
    row = recipe.row(own)
    refuse_unfit(family, settled)
    teacher = _load_teacher(folder, family, settled)
    data = learned(settled, tokenizer, row, teacher)
    held_out, questions = judged(settled, tokenizer)
    torch.manual_seed(recipe.seed)
    first_loss = partial(_first_loss, settled, row, data.examples, teacher)
    modules, parameters = _modules(folder, family, settled, row, own, first_loss, ranks=ranks)
    parameters = ranks.spread({id(m.model): m.model for m in modules.values()}.values(), parameters)
    if recipe.gradient_checkpointing:
        for module in modules.values():
            module.model.checkpointing = True
    for line in (*notes(data), *(notes(held_out) if held_out else ())):
        echo(line)
    steps = settled.total_steps(-(-len(data.examples) // (settled.batch_size * ranks.count)))
    return Job(
        folder=folder,
        family=family,
        recipe=settled,
        tokenizer=tokenizer,
        row=row,
        own=own,
        modules=modules,
        parameters=parameters,
        examples=data.examples,
        skipped=len(data.bad) + len(data.too_long),
        held_out=held_out.examples[:JUDGED] if held_out else (),
        questions=questions[: settled.eval_samples],
        teacher=teacher,
        steps=steps,
        ranks=ranks,
    )


def settle(recipe: Recipe, config: ModelConfig) -> Settled:
    """The recipe with every `auto` a value, on this machine and for a model of this shape. Refused where they differ."""
    device = device_named(recipe.device)
    fast = best_dtype(device) is torch.bfloat16
    settled = recipe.resolve(bf16=fast, hidden_size=config.width, device=device)
    settled.check_targets(config.linears)
    check_tracker(settled.report_to)
    return settled.model_copy(update={"max_length": min(settled.max_length, config.max_length)})


def refuse_unfit(family: Family, recipe: Recipe) -> None:
    """Refuse a ``speaker`` or ``writer`` that the family has not, or that is an adapter."""
    for option, name in (("speaker", recipe.speaker), ("writer", recipe.writer)):
        if name is not None and (base := family.module(name).base) is not None:
            raise Refused(f"{option} {name!r} is an adapter on {base!r}: a whole module is needed there")


def objective_of(job: Job, *, tell: Callable[[str], None] = lambda line: None) -> MemberObjective:
    """What the job learns, step by step."""
    size = job.recipe.per_device_train_batch_size * job.ranks.count
    batches = Batches(job.examples, batch_size=size, seed=job.recipe.seed)
    learner = _learner(job, tell) if job.recipe.dropbp else None
    accumulation = job.recipe.gradient_accumulation_steps
    return MemberObjective(batches, accumulation, job.row, job.modules, job.teacher, learner, job.ranks)


def _learner(job: Job, tell: Callable[[str], None]) -> Learner:
    """Who is trained, with the branches that the recipe drops."""
    recipe, row, model = job.recipe, job.row, job.modules[job.own].model
    length = sum(len(e.ids) for e in job.examples) / len(job.examples)
    # Whoever reads what the member writes hears of it through keys and values alone: they stay on the tape.
    readers = {row.answer_writer, row.speaker} if job.own == row.prompt_writer else {row.speaker}
    writes = job.own in (row.prompt_writer, row.answer_writer)
    written = writes and readers != {job.own}
    branches = branches_of(
        model.config,
        job.parameters,
        whole=recipe.tuner == "full",
        writes_for_itself=writes and not written,
        context=length / 2 if job.own == row.prompt_writer else length,
    )
    dropping = Dropping(
        branches,
        recipe.dropbp,
        seed=recipe.seed,
        measured_at=max(1, round(UNIFORM_SHARE * job.steps))
        if recipe.dropbp_rates == "sensitivity"
        else None,
        folder=job.run_folder,
        written=written,
        writes=job.ranks.first,
        tell=tell,
    )
    return Learner(job.own, job.parameters, dropping, recipe.bf16)


def learned(recipe: Settled, tokenizer: Tokenizer, row: Row, teacher: Loaded | None) -> Examples:
    """The examples of all files. Raises Refused for bad lines, and for texts where the row parts a model in two."""
    read = read_examples if teacher is None else partial(taught_examples, teacher=teacher)
    found = [
        read(
            path, tokenizer, max_length=recipe.max_length, skip_bad=recipe.skip_bad, too_long=recipe.too_long
        )
        for path in recipe.data
    ]
    texts = [f.path for f in found if f.format == "text"]
    if texts and not row.alone:
        raise Refused(
            f"{texts[0]} is plain text, which has no prompt and no answer: sharing {recipe.sharing!r} "
            "parts a model between the two. Give prompts with answers, or use --sharing independent"
        )
    return joined(found)


def joined(found: Sequence[Examples]) -> Examples:
    """Several files' examples as one set."""
    return Examples(
        found[0].path,
        found[0].format,
        tuple(e for f in found for e in f.examples),
        tuple(b for f in found for b in f.bad),
        tuple(b for f in found for b in f.too_long),
    )


def judged(recipe: Settled, tokenizer: Tokenizer) -> tuple[Examples | None, tuple[Record, ...]]:
    """Held-out examples and the records among them that ask something; those that are too long are left out.

    Nothing where no eval_data are given.
    """
    if recipe.eval_data is None:
        return None, ()
    options: dict[str, Any] = {"max_length": recipe.max_length, "skip_bad": recipe.skip_bad}
    found = read_examples(recipe.eval_data, tokenizer, too_long="skip", **options)
    left_out = {line.line for line in (*found.bad, *found.too_long)}
    records = read_jsonl(recipe.eval_data, skip_bad=recipe.skip_bad).records
    return found, tuple(r for r in records if r.answer is not None and r.line not in left_out)


def notes(data: Examples) -> list[str]:
    """What was left out of some data, for people: how many lines, and why the first."""
    left_out = (("bad lines", data.bad), ("records longer than max_length allows", data.too_long))
    return [
        f"left out {len(lines)} {what}, the first: {data.path}:{lines[0].line}: {lines[0].reason}"
        for what, lines in left_out
        if lines
    ]


def teacher_row(family: Family, teacher: str) -> Row:
    """The row of a teacher; refused where it is no whole model."""
    row = family.row(teacher)
    if not row.alone:
        raise Refused(
            f"teacher {teacher!r} shares its row with the base; only a whole model can teach (independent)"
        )
    return row


def _load_teacher(folder: Path, family: Family, recipe: Settled) -> Loaded | None:
    if recipe.teacher is None:
        return None
    row = teacher_row(family, recipe.teacher)
    kind = torch.bfloat16 if recipe.bf16 else torch.float32
    return load_modules(folder, family, [row.speaker], dtype=kind, device=recipe.device)[row.speaker]


def _modules(
    folder: Path,
    family: Family,
    recipe: Settled,
    row: Row,
    own: str,
    first_loss: Callable[[Mapping[str, Loaded]], Tensor],
    *,
    ranks: Ranks,
) -> tuple[dict[str, Loaded], dict[str, nn.Parameter]]:
    """The row's modules in memory, and what of them is trained."""
    frozen_kind = torch.bfloat16 if recipe.bf16 else torch.float32
    frozen = [name for name in row.modules if name != own]
    for name in dict.fromkeys([BASE, *frozen]):
        verify_module(folder, family, name)

    def still(names: Sequence[str], kind: torch.dtype) -> dict[str, Loaded]:
        # What lies in codebooks is a constant here: its weights are made once, not in every step.
        options: dict[str, Any] = {"dtype": kind, "device": recipe.device, "verify": False, "dense": True}
        return load_modules(folder, family, names, **options)

    if recipe.adapts:
        known = kept_columns(folder / RUNS / recipe.member, recipe)
        return adapt(
            still([recipe.seat, *frozen], frozen_kind),
            recipe,
            own,
            resident=row.alone and not ranks.sharded,
            first_loss=first_loss,
            known=known,
            ranks=ranks,
        )
    own_model = still([BASE], torch.float32)[BASE].model
    modules = {own: Loaded(own, "", own, own_model), **still(frozen, frozen_kind)}
    for name, parameter in own_model.named_parameters():
        parameter.requires_grad_(not idle(name, row, own))
    return modules, {n: p for n, p in own_model.named_parameters() if p.requires_grad}


def _first_loss(
    recipe: Settled,
    row: Row,
    examples: Sequence[Example],
    teacher: Loaded | None,
    modules: Mapping[str, Loaded],
) -> Tensor:
    """Mean loss of the run's first batch, with a tape."""
    batches = Batches(examples, batch_size=recipe.per_device_train_batch_size, seed=recipe.seed)
    (micro,) = MemberObjective(batches, 1, row, modules, teacher).micros(0)
    with torch.autocast(torch.device(recipe.device).type, dtype=torch.bfloat16, enabled=recipe.bf16):
        return micro.loss() / micro.spoken
