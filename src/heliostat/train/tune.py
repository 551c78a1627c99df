"""Tune one member of a family: from a recipe to a new module, a new row and the facts about both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heliostat.build import (
    BASE,
    RUNS,
    Loaded,
    best_dtype,
    changing,
    config_of,
    describe_module,
    load_modules,
    load_tokenizer,
    module_folder,
    new_module_folder,
    read_family,
    verify_module,
    write_family,
)
from heliostat.errors import Refused
from heliostat.family import SHARINGS, Family, Member, Row, own_module_name
from heliostat.files import atomic_directory, atomic_write_text, locked, read_json
from heliostat.linear.adapter import save_adapter
from heliostat.linear.lora import adapter_of, add_adapter
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.weights import read_tensors, save_checkpoint, state_of, weight_files
from heliostat.train import checkpoint
from heliostat.train.data import Batches, Example, Examples, read_examples
from heliostat.train.formats import Record, read_jsonl
from heliostat.train.loop import Run, Settings, Watch
from heliostat.train.objective import MemberObjective, evaluation_loss
from heliostat.train.recipe import Pace, Recipe, Settled
from heliostat.train.spellings import changes, to_yaml
from heliostat.train.teacher import taught_examples
from heliostat.train.watch import draw_loss

JUDGED = 256
"""Held-out examples whose loss is measured during a run."""
FREE = frozenset(
    (
        "family",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "eval_data",
        "metric",
    )
)
"""Fields of a recipe that may change between the parts of one run."""


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
    teacher: Loaded | None
    steps: int

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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to."""

    member: Member
    run_folder: Path
    history: tuple[Mapping[str, Any], ...]
    parameters: int


def tune(
    recipe: Recipe,
    *,
    watching: Callable[[Job], AbstractContextManager[Watch]],
    echo: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Run a recipe to its end and add the member to the family; an unfinished run of the same recipe goes on.

    ``watching`` makes who looks on once the job is known. Raises Refused before anything is trained where recipe,
    data or family do not fit; raises loop.Interrupted on Ctrl-C, with everything saved.
    """
    folder = Path(recipe.family)
    _check_name(read_family(folder), recipe)
    run_folder = folder / RUNS / recipe.member
    run_folder.mkdir(parents=True, exist_ok=True)
    with locked(run_folder / "run.lock", wait=False):
        job = prepare(recipe, echo=echo)
        _keep_recipe(job)
        with watching(job) as watch:
            history = _run(job, watch)
        draw_loss(
            history, run_folder / "loss.svg", title=f"{recipe.member}: {recipe.sharing}, {recipe.tuner}"
        )
        member = _publish(job, history)
        for old in checkpoint.checkpoints(run_folder):
            checkpoint.discard(old)
    return Outcome(member, run_folder, history, job.trainable)


def _check_name(family: Family, recipe: Recipe) -> None:
    """Refuse a name that is taken; where this very recipe took it, there is nothing left to do."""
    folder, name = recipe.family, recipe.member
    if name in family.members and recipe.made(family.member(name).recipe, ignored=FREE):
        raise Refused(
            f"there is already a member {name!r}, and this recipe made it: it is finished. See it: heliostat inspect "
            f"{folder}; to train it anew, first heliostat member rm {folder} {name}"
        )
    family.free_name(name, folder=folder)


def prepare(recipe: Recipe, *, echo: Callable[[str], None] = lambda line: None) -> Job:
    """Read, check and load everything; refuses what cannot work, with the reason, before any training."""
    folder = Path(recipe.family)
    family = read_family(folder)
    config, tokenizer = config_of(folder, family), load_tokenizer(folder, family)
    settled = recipe.resolve(bf16=best_dtype() is torch.bfloat16, hidden_size=config.width)
    settled.check_targets(config.linears)
    own = own_module_name(recipe.member, family.modules)
    row = SHARINGS[recipe.sharing].instantiate(own)
    if settled.max_length > config.max_length:
        settled = settled.model_copy(update={"max_length": config.max_length})
    teacher = _load_teacher(folder, family, settled)
    data = learned(settled, tokenizer, row, teacher)
    held_out = judged(settled, tokenizer)
    torch.manual_seed(recipe.seed)
    modules, parameters = _modules(folder, family, settled, row, own)
    if recipe.gradient_checkpointing:
        for module in modules.values():
            module.model.checkpointing = True
    for note in _notes(data):
        echo(note)
    steps = settled.total_steps(-(-len(data.examples) // settled.batch_size))
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
        held_out=held_out[:JUDGED],
        teacher=teacher,
        steps=steps,
    )


def settings_of(recipe: Pace, *, steps: int, warmup: int) -> Settings:
    """The loop's settings that a resolved recipe asks for."""
    return Settings(
        steps=steps,
        learning_rate=recipe.learning_rate,  # type: ignore[attr-defined]
        lr_scheduler_type=recipe.lr_scheduler_type,  # type: ignore[attr-defined]
        warmup_steps=warmup,
        decay_share=recipe.decay_ratio,
        weight_decay=recipe.weight_decay,  # type: ignore[attr-defined]
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        epsilon=recipe.adam_epsilon,
        max_grad_norm=recipe.max_grad_norm,
        bf16=bool(recipe.bf16),
        logging_steps=recipe.logging_steps,
        eval_steps=recipe.eval_steps,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
    )


def identity_of(facts: Mapping[str, Any]) -> str:
    """What must be equal for a run to go on from a checkpoint (hex)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def objective_of(job: Job) -> MemberObjective:
    """What the job learns, step by step."""
    batches = Batches(job.examples, batch_size=job.recipe.per_device_train_batch_size, seed=job.recipe.seed)
    return MemberObjective(batches, job.recipe.gradient_accumulation_steps, job.row, job.modules, job.teacher)


def _run(job: Job, watch: Watch) -> tuple[Mapping[str, Any], ...]:
    recipe = job.recipe
    settings = settings_of(recipe, steps=job.steps, warmup=recipe.warmup_steps(job.steps))
    judge = None
    if job.held_out:
        judge = lambda: {"loss": evaluation_loss(job.held_out, job.row, job.modules, bf16=recipe.bf16)}  # noqa: E731
    run = Run(objective_of(job), job.parameters, settings, job.run_folder, _identity(job), watch, judge)
    return run.fit(resume=recipe.resume_from_checkpoint is not False).history


def _identity(job: Job) -> str:
    facts = job.recipe.model_dump(exclude=set(FREE)) | {
        "examples": hashlib.sha256(repr(job.examples).encode()).hexdigest(),
        "digests": {
            name: m.digest for name, m in job.family.modules.items() if name in (*job.row.modules, BASE)
        },
        **({"teacher_digest": job.teacher.digest} if job.teacher is not None else {}),
    }
    return identity_of(facts)


def _keep_recipe(job: Job) -> None:
    """Write the recipe into the run's folder, once it is known that it begins anew or goes on with what lies there."""
    path, resume = job.run_folder / "recipe.yaml", job.recipe.resume_from_checkpoint
    if resume is True and not checkpoint.checkpoints(job.run_folder):
        raise Refused(f"--resume-from-checkpoint true, but {job.run_folder} holds no checkpoint")
    if resume is not False:
        changed = changes(job.recipe, path, ignored=FREE)
        why = f" ({'; '.join(changed)})" if changed else ""
        checkpoint.refuse_other(job.run_folder, identity=_identity(job), why=why)
    atomic_write_text(path, to_yaml(job.recipe))


def learned(recipe: Settled, tokenizer: Tokenizer, row: Row, teacher: Loaded | None) -> Examples:
    """The examples of all files. Raises Refused for bad lines, and for texts where the row parts a model in two."""
    found = []
    for path in recipe.data:
        options = {"max_length": recipe.max_length, "skip_bad": recipe.skip_bad, "too_long": recipe.too_long}
        if teacher is not None:
            found.append(taught_examples(path, tokenizer, teacher, **options))  # type: ignore[arg-type]
        else:
            found.append(read_examples(path, tokenizer, **options))  # type: ignore[arg-type]
    texts = [f.path for f in found if f.format == "text"]
    if texts and not row.alone:
        raise Refused(
            f"{texts[0]} is plain text, which has no prompt and no answer: sharing {recipe.sharing!r} "
            "parts a model between the two. Give prompts with answers, or use --sharing independent"
        )
    return Examples(
        found[0].path,
        found[0].format,
        tuple(e for f in found for e in f.examples),
        tuple(b for f in found for b in f.bad),
        tuple(b for f in found for b in f.too_long),
    )


def judged(recipe: Settled, tokenizer: Tokenizer) -> tuple[Example, ...]:
    """Held-out examples, none where no eval_data are given; those that are too long are left out."""
    if recipe.eval_data is None:
        return ()
    return read_examples(recipe.eval_data, tokenizer, max_length=recipe.max_length, too_long="skip").examples


def _notes(data: Examples) -> list[str]:
    left_out = (("bad lines", data.bad), ("records longer than max_length allows", data.too_long))
    return [
        f"left out {len(lines)} {what}, the first: line {lines[0].line}: {lines[0].reason}"
        for what, lines in left_out
        if lines
    ]


def _load_teacher(folder: Path, family: Family, recipe: Settled) -> Loaded | None:
    if recipe.teacher is None:
        return None
    row = family.row(recipe.teacher)
    if not row.alone:
        raise Refused(
            f"teacher {recipe.teacher!r} shares its row with the base; only a whole model can teach (independent)"
        )
    kind = torch.bfloat16 if recipe.bf16 else torch.float32
    return load_modules(folder, family, [row.speaker], dtype=kind)[row.speaker]


def _modules(
    folder: Path, family: Family, recipe: Settled, row: Row, own: str
) -> tuple[dict[str, Loaded], dict[str, nn.Parameter]]:
    """The row's modules in memory, and what of them is trained."""
    frozen_kind = torch.bfloat16 if recipe.bf16 else torch.float32
    verify_module(folder, family, BASE)
    if recipe.tuner == "lora":
        return _with_adapter(
            load_modules(folder, family, [BASE], dtype=frozen_kind, verify=False), recipe, own
        )
    own_model = load_modules(folder, family, [BASE], dtype=torch.float32, verify=False)[BASE].model
    modules = {own: Loaded(own, "", own, own_model)}
    if BASE in row.modules:
        modules |= load_modules(folder, family, [BASE], dtype=frozen_kind, verify=False)
    written = {row.prompt_writer, row.answer_writer}
    for name, parameter in own_model.named_parameters():
        # A module that only speaks reads others' keys and values; its own projections for them are never used.
        parameter.requires_grad_(
            own in written or not any(part in name for part in ("k_proj", "v_proj", "k_norm"))
        )
    return modules, {n: p for n, p in own_model.named_parameters() if p.requires_grad}


def _with_adapter(
    loaded: dict[str, Loaded], recipe: Settled, own: str
) -> tuple[dict[str, Loaded], dict[str, nn.Parameter]]:
    assert recipe.r is not None and recipe.lora_alpha is not None and recipe.target_modules is not None
    model = loaded[BASE].model
    add_adapter(model, own, r=recipe.r, alpha=recipe.lora_alpha, targets=recipe.target_modules)
    parts = adapter_of(model, own)
    parameters = {f"{path}.{name}": p for path, part in parts.items() for name, p in part.named_parameters()}
    return {**loaded, own: Loaded(own, "", BASE, model, own)}, parameters


def _publish(job: Job, history: tuple[Mapping[str, Any], ...]) -> Member:
    """Write the module, then the family's entry; a crash between the two leaves a folder that nobody names."""
    with changing(job.folder):
        family = read_family(job.folder)
        family.free_name(job.recipe.member, folder=job.recipe.family)
        own = own_module_name(job.recipe.member, family.modules)
        path = new_module_folder(job.folder, family, own)
        with atomic_directory(job.folder / path) as partial:
            _save_own(job, partial)
        family = family.with_module(
            describe_module(
                job.folder, own, path, base=BASE if job.recipe.tuner == "lora" else None, family=family
            )
        )
        row = SHARINGS[job.recipe.sharing].instantiate(own)
        digests = {name: family.module(name).digest for name in row.modules}
        facts = {k: v for k, v in job.recipe.model_dump(mode="json").items() if k not in ("family", "member")}
        losses = {
            "loss": history[-1]["loss"],
            **({"eval_loss": history[-1]["eval_loss"]} if job.held_out else {}),
        }
        member = Member(job.recipe.member, row, job.recipe.sharing, digests, facts, losses)
        write_family(job.folder, family.with_member(member))
    return member


def _save_own(job: Job, target: Path) -> None:
    recipe, base = job.recipe, module_folder(job.folder, job.family.module(BASE))
    model = job.modules[job.own].model
    if recipe.tuner == "lora":
        assert recipe.r is not None and recipe.lora_alpha is not None
        return save_adapter(target, model, job.own, r=recipe.r, alpha=recipe.lora_alpha, base=str(BASE))
    kind = next(read_tensors(weight_files(base)))[1].dtype  # as the base is stored
    state = {name: tensor.to(kind) for name, tensor in state_of(model).items()}
    save_checkpoint(target, state, read_json(base / "config.json"))


def note_evaluation(folder: Path, member: str, facts: Mapping[str, Any]) -> None:
    """Remember an evaluation in family.json."""
    with changing(folder):
        family = read_family(folder)
        entry = family.member(member)
        merged = {**entry.evaluation, **facts}
        changed = Member(entry.name, entry.row, entry.sharing, entry.digests, entry.recipe, merged)
        write_family(folder, family.with_member(changed))


def first_prompts(recipe: Recipe, count: int) -> list[Record]:
    """A few held-out prompts (or training ones where none are held out) to show before and after."""
    return list(
        read_jsonl(
            recipe.eval_data or recipe.data[0], skip_bad=True, prompts=recipe.teacher is not None
        ).records[:count]
    )
