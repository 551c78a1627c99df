"""Tune one member of a family: from a recipe to a new module, a new row and the facts about both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heliostat.build import (
    BASE,
    RUNS,
    changing,
    describe_module,
    module_folder,
    new_module_folder,
    read_family,
    write_family,
)
from heliostat.errors import Refused
from heliostat.family import Family, Member, own_module_name
from heliostat.files import atomic_directory, atomic_write_text, locked, read_json
from heliostat.model.alpha import format_of
from heliostat.model.weights import format_on_disk, save_checkpoint, state_of, weight_files
from heliostat.train import checkpoint
from heliostat.train.adapting import keep_columns, save_own
from heliostat.train.evaluate import accuracy_in_training
from heliostat.train.formats import Record, read_jsonl
from heliostat.train.job import JUDGED, Job, objective_of, prepare
from heliostat.train.loop import Run, Watch
from heliostat.train.objective import evaluation_loss
from heliostat.train.ranks import ALONE, Ranks
from heliostat.train.recipe import Recipe
from heliostat.train.settings import identity_of, settings_of
from heliostat.train.spellings import changes, to_yaml
from heliostat.train.track import tracking
from heliostat.train.watch import Silent, draw_loss

__all__ = [
    "FREE",
    "JUDGED",
    "Job",
    "Outcome",
    "first_prompts",
    "note_evaluation",
    "objective_of",
    "prepare",
    "settings_of",
    "tune",
]

FREE = frozenset(
    (
        "family",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "eval_data",
        "eval_samples",
        "metric",
        "report_to",
        "device",
        "data_parallel",
    )
)
"""Fields of a recipe that may change between the parts of one run."""


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
    ranks: Ranks = ALONE,
) -> Outcome:
    """Run a recipe to its end and add the member to the family; an unfinished run of the same recipe goes on.

    ``watching`` makes who looks on once the job is known. Raises Refused before anything is trained where recipe,
    data or family do not fit; raises loop.Interrupted on Ctrl-C, with everything saved. Of several ``ranks`` each
    calls this; the first one writes, tells and is watched.
    """
    folder = Path(recipe.family)
    _check_name(read_family(folder), recipe)
    run_folder = folder / RUNS / recipe.member
    run_folder.mkdir(parents=True, exist_ok=True)
    if not ranks.first:
        watching, echo = _nobody, _unheard
    with locked(run_folder / "run.lock", wait=False) if ranks.first else nullcontext():
        job = prepare(recipe, ranks=ranks, echo=echo)
        _keep_recipe(job)
        report_to = job.recipe if ranks.first else job.recipe.model_copy(update={"report_to": "none"})
        with (
            watching(job) as watch,
            tracking(report_to, watch, run_folder, recipe.member, tell=echo) as both,
        ):
            history = _run(job, both, echo)
        ranks.gather({id(m.model): m.model for m in job.modules.values()}.values())
        if ranks.first:
            _finish(job, history)
        ranks.wait()
    return Outcome(read_family(folder).member(recipe.member), run_folder, history, job.trainable)


def _nobody(job: Job) -> AbstractContextManager[Watch]:
    return nullcontext(Silent())


def _unheard(line: str) -> None:
    """What only the first process says."""


def _finish(job: Job, history: tuple[Mapping[str, Any], ...]) -> None:
    recipe, folder = job.recipe, job.run_folder
    draw_loss(history, folder / "loss.svg", title=f"{recipe.member}: {recipe.sharing}, {recipe.tuner}")
    _publish(job, history)
    for old in checkpoint.checkpoints(folder):
        checkpoint.discard(old)


def _check_name(family: Family, recipe: Recipe) -> None:
    """Refuse a name that is taken; where this very recipe took it, there is nothing left to do."""
    folder, name = recipe.family, recipe.member
    if name in family.members and recipe.made(family.member(name).recipe, ignored=FREE):
        raise Refused(
            f"there is already a member {name!r}, and this recipe made it: it is finished. See it: heliostat inspect "
            f"{folder}; to train it anew, first heliostat member rm {folder} {name}"
        )
    family.free_name(name, folder=folder)


def _run(job: Job, watch: Watch, echo: Callable[[str], None]) -> tuple[Mapping[str, Any], ...]:
    recipe = job.recipe
    settings = settings_of(recipe, steps=job.steps, warmup=recipe.warmup_steps(job.steps))
    objective = objective_of(job, tell=echo)
    judge = _judge(job, echo)
    run = Run(objective, job.parameters, settings, job.run_folder, _identity(job), watch, judge, job.ranks)
    return run.fit(resume=recipe.resume_from_checkpoint is not False).history


def _judge(job: Job, echo: Callable[[str], None]) -> Callable[[], Mapping[str, float]] | None:
    """What is measured on held-out data: the loss, and in the course of the run also right answers."""
    if not job.held_out:
        return None
    # At the end alone, whoever tunes asks the finished member, as it will be served.
    questions = job.questions if job.recipe.eval_steps else ()
    if questions and not job.ranks.alone:
        echo("answers are graded at the end only: in the course of a run one process does that, not several")
        questions = ()

    def judge() -> Mapping[str, float]:
        loss = evaluation_loss(job.held_out, job.row, job.modules, bf16=job.recipe.bf16)
        if not questions:
            return {"loss": loss}
        right = accuracy_in_training(questions, job.row, job.modules, job.tokenizer, metric=job.recipe.metric)
        return {"loss": loss, "accuracy": right}

    return judge


def _identity(job: Job) -> str:
    # Arguments that came later and are not used are left out: as runs say that were begun before.
    unused = (*(() if job.recipe.dropbp else ("dropbp", "dropbp_rates")),)
    unused += () if job.recipe.tuner == "paca" else ("columns",)
    unused += tuple(name for name in ("speaker", "writer") if getattr(job.recipe, name) is None)
    facts = job.recipe.model_dump(exclude={*FREE, *unused}) | {
        "report_to": "none",  # as runs say that were begun before it could be anything else
        "examples": hashlib.sha256(repr(job.examples).encode()).hexdigest(),
        "digests": {
            name: m.digest for name, m in job.family.modules.items() if name in (*job.row.modules, BASE)
        },
        **({"teacher_digest": job.teacher.digest} if job.teacher is not None else {}),
        **({} if job.ranks.alone else {"processes": job.ranks.count}),
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
    if not job.ranks.first:
        return
    atomic_write_text(path, to_yaml(job.recipe))
    keep_columns(job.run_folder, job.modules[job.own])


def _publish(job: Job, history: tuple[Mapping[str, Any], ...]) -> None:
    """Write the module, then the family's entry; a crash between the two leaves a folder that nobody names."""
    with changing(job.folder):
        family = read_family(job.folder)
        family.free_name(job.recipe.member, folder=job.recipe.family)
        _refuse_others(job, family)
        own = own_module_name(job.recipe.member, family.modules)
        path = new_module_folder(job.folder, family, own)
        with atomic_directory(job.folder / path) as partial:
            _save_own(job, partial)
        family = family.with_module(
            describe_module(
                job.folder, own, path, base=job.recipe.seat if job.recipe.adapts else None, family=family
            )
        )
        row = job.recipe.row(own)
        digests = {name: family.module(name).digest for name in row.modules}
        facts = {k: v for k, v in job.recipe.model_dump(mode="json").items() if k not in ("family", "member")}
        losses = {
            "loss": history[-1]["loss"],
            **({"eval_loss": history[-1]["eval_loss"]} if job.held_out else {}),
        }
        member = Member(job.recipe.member, row, job.recipe.sharing, digests, facts, losses)
        write_family(job.folder, family.with_member(member))


def _refuse_others(job: Job, family: Family) -> None:
    """Refuse to publish a member beside frozen modules that are not those it was tuned with."""
    for name in [name for name in job.row.modules if name != job.own]:
        digest = job.family.module(name).digest
        if name not in family.modules or family.module(name).digest != digest:
            raise Refused(
                f"module {name!r} is no longer what this member was tuned with (digest {digest[:12]}): put that back "
                "and run this again, which goes on where it ended; or begin anew with --resume-from-checkpoint false"
            )


def _save_own(job: Job, target: Path) -> None:
    base = module_folder(job.folder, job.family.module(BASE))
    if job.recipe.adapts:
        return save_own(target, job.modules[job.own], job.recipe)
    kind = format_on_disk(weight_files(base))
    own = state_of(job.modules[job.own].model)
    state = {name: tensor.to(format_of(name, kind)) for name, tensor in own.items()}
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
