"""Make a base from scratch: text to tokenizer to packed rows to a checkpoint in Hugging Face's layout."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heliostat.build import best_dtype, device_named
from heliostat.errors import Refused
from heliostat.files import atomic_directory, atomic_write_text, locked
from heliostat.model.alpha import KEPT_WHOLE, format_of, settle
from heliostat.model.attention_kind import KEY, PREFIX
from heliostat.model.config import config_json, parse_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.model.weights import save_checkpoint, state_of
from heliostat.plot import lines
from heliostat.train import checkpoint, step_log
from heliostat.train.distil import Teacher, load_teacher
from heliostat.train.loop import Run, Watch
from heliostat.train.pretrain_recipe import PretrainRecipe, SettledPretraining
from heliostat.train.pretrain_text import read_rows, tokenizer_folder
from heliostat.train.ranks import ALONE, Ranks
from heliostat.train.settings import identity_of, settings_of
from heliostat.train.spellings import to_yaml
from heliostat.train.step_log import logging_steps, read_steps
from heliostat.train.text import PackedRows, TextObjective, text_loss
from heliostat.train.track import check_tracker, tracking
from heliostat.train.watch import Silent, draw_loss

History = tuple[Mapping[str, Any], ...]
MOST_NATS = 100.0
"""Losses above count as this in a perplexity, which would not be a number."""
FREE = (
    "output_dir",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "eval_steps",
    "device",
    "data_parallel",
)
"""Arguments that may change between the parts of one run."""


@dataclass(frozen=True, slots=True)
class Pretrained:
    """What a pretraining run came to."""

    folder: Path
    history: tuple[Mapping[str, Any], ...]
    parameters: int
    tokens: int


def pretrain(
    recipe: PretrainRecipe,
    *,
    watching: Callable[[SettledPretraining], AbstractContextManager[Watch]],
    echo: Callable[[str], None] = lambda line: None,
    ranks: Ranks = ALONE,
) -> Pretrained:
    """Run a recipe to its end; an unfinished run of the same recipe goes on.

    Checkpoints, logs and pictures lie in ``<output_dir>.run``. Raises Refused for data or shapes that do not fit. Of
    several ``ranks`` each calls this; the first one writes, tells and is watched.
    """
    device = device_named(recipe.device)
    settled = recipe.resolve(bf16=best_dtype(device) is torch.bfloat16, device=device)
    check_tracker(settled.report_to)
    out = Path(recipe.output_dir)
    if out.exists():
        raise Refused(f"{out} is already there; choose another output_dir, or remove it first")
    run_folder = out.with_name(f"{out.name}.run")
    run_folder.mkdir(parents=True, exist_ok=True)
    with locked(run_folder / "run.lock", wait=False) if ranks.first else nullcontext():
        if ranks.first:
            tokenizer_folder(settled, run_folder)
        ranks.wait()
        work = _prepare(settled, run_folder, echo if ranks.first else _unheard, ranks)
        history = _watched(work, watching, echo)
        ranks.gather([work.model])
        if ranks.first:
            _finish(work, history, out)
        ranks.wait()
    tokens = settled.tokens_per_batch * settled.max_steps * ranks.count
    return Pretrained(out, history, work.model.config.parameters, tokens)


@dataclass(frozen=True, slots=True)
class Work:
    """A run that is ready to begin."""

    recipe: SettledPretraining
    run_folder: Path
    tokenizer: Tokenizer
    tokenizer_folder: Path
    model: Transformer
    rows: PackedRows
    held_out: PackedRows
    teacher: Teacher | None
    ranks: Ranks


def _prepare(recipe: SettledPretraining, run_folder: Path, echo: Callable[[str], None], ranks: Ranks) -> Work:
    folder = tokenizer_folder(recipe, run_folder)
    tokenizer = Tokenizer.load(folder)
    teacher = _teacher(recipe, tokenizer)
    taught = teacher.model.config.vocabulary if teacher is not None else 0
    model = new_model(recipe, taught or max(tokenizer.size, recipe.vocab_size)).to(recipe.device)
    rows, held_out = read_rows(recipe, tokenizer, echo, processes=ranks.count)
    return Work(recipe, run_folder, tokenizer, folder, model, rows, held_out, teacher, ranks)


def _teacher(recipe: SettledPretraining, tokenizer: Tokenizer) -> Teacher | None:
    if recipe.teacher is None or recipe.distill_weight is None or recipe.distill_temperature is None:
        return None
    return load_teacher(
        Path(recipe.teacher),
        tokenizer,
        weight=recipe.distill_weight,
        temperature=recipe.distill_temperature,
        dtype=torch.bfloat16 if recipe.bf16 else torch.float32,
        device=recipe.device,
        length=recipe.max_length,
    )


def _watched(
    work: Work,
    watching: Callable[[SettledPretraining], AbstractContextManager[Watch]],
    echo: Callable[[str], None],
) -> History:
    """The run, seen by who looks on, by a tracker and by the log of steps; only in the first process."""
    if not work.ranks.first:
        return _run(work, Silent())
    folder = work.run_folder
    with (
        watching(work.recipe) as watch,
        tracking(work.recipe, watch, folder, Path(work.recipe.output_dir).name, tell=echo) as both,
        logging_steps(both, folder / step_log.NAME) as all_of_them,
    ):
        return _run(work, all_of_them)


def _unheard(line: str) -> None:
    """What only the first process says."""


def new_model(recipe: SettledPretraining, vocabulary: int) -> Transformer:
    """A fresh model of the recipe's shape: matrices normal by their input width, branches' ends smaller with depth.

    What a model begins with at zero stays there.
    """
    torch.manual_seed(recipe.seed)
    model = Transformer(parse_config(shape_of(recipe, vocabulary)))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or not parameter.any():
            continue
        spread = 0.02 if "embed_tokens" in name or "lm_head" in name else parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            spread /= (2 * recipe.num_hidden_layers) ** 0.5
        torch.nn.init.normal_(parameter, std=spread)
    return model


def shape_of(recipe: SettledPretraining, vocabulary: int) -> dict[str, Any]:
    """The recipe's shape as config.json says it."""
    kind = recipe.attention_kind
    own = {} if kind.plain else {"model_type": PREFIX + recipe.architecture, KEY: kind.to_json()}
    return {
        "model_type": recipe.architecture,
        **own,
        "vocab_size": vocabulary,
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.num_hidden_layers,
        "num_attention_heads": recipe.num_attention_heads,
        "num_key_value_heads": recipe.num_key_value_heads,
        "head_dim": recipe.head_dim,
        "intermediate_size": recipe.intermediate_size,
        "max_position_embeddings": recipe.max_position_embeddings,
        "tie_word_embeddings": recipe.tie_word_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": recipe.rope_theta},
        "rms_norm_eps": 1e-6,
        "sliding_window": None,
    }


def _run(work: Work, watch: Watch) -> History:
    recipe, folder, model = work.recipe, work.run_folder, work.model
    parameters = work.ranks.spread([model], dict(model.named_parameters()))
    objective = TextObjective(
        model,
        work.rows,
        recipe.per_device_train_batch_size,
        recipe.gradient_accumulation_steps,
        recipe.seed,
        work.teacher,
        work.ranks,
    )
    model.checkpointing = recipe.gradient_checkpointing

    def judge() -> dict[str, float]:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=recipe.bf16):
            loss = text_loss(model, work.held_out)
        return {"loss": loss, "perplexity": math.exp(min(loss, MOST_NATS))}

    settings = settings_of(recipe, steps=recipe.max_steps, warmup=recipe.warmup_steps())
    if recipe.resume_from_checkpoint is True and not checkpoint.checkpoints(folder):
        raise Refused(f"--resume-from-checkpoint true, but {folder} holds no checkpoint")
    run = Run(objective, parameters, settings, folder, _identity(work), watch, judge, work.ranks)
    run.buffers = {name: b for name, b in model.named_buffers() if name.endswith(KEPT_WHOLE)}
    run.after = lambda: settle(model, work.ranks.summed)
    return run.fit(resume=recipe.resume_from_checkpoint is not False).history


def _identity(work: Work) -> str:
    """By tokenizer, rows, teacher and all arguments but those that may change between the parts of a run."""
    data = hashlib.sha256(work.rows.ids.numpy().data)
    data.update(work.rows.documents.numpy().data)
    facts = {
        "tokenizer": work.tokenizer.digest,
        "rows": data.hexdigest(),
        "report_to": "none",
        **({"teacher_digest": work.teacher.digest} if work.teacher is not None else {}),
        **({} if work.ranks.alone else {"processes": work.ranks.count}),
    }
    return identity_of(work.recipe.model_dump(exclude=set(FREE)) | facts)


def _finish(work: Work, history: History, out: Path) -> None:
    """The checkpoint of the new base, then its recipe and pictures; the run's own checkpoints go."""
    folder = work.run_folder
    atomic_write_text(folder / "recipe.yaml", to_yaml(work.recipe))
    draw_loss(history, folder / "loss.svg", title=f"pretraining {out.name}")
    _draw_gradient(folder)
    _write(work.model, work.tokenizer_folder, out)
    for old in checkpoint.checkpoints(folder):
        checkpoint.discard(old)


def _draw_gradient(folder: Path) -> None:
    """Every step's gradient; no picture where the power went and took lines along that no checkpoint holds."""
    try:
        norms = [(r["step"], r["grad_norm"]) for r in read_steps(folder / step_log.NAME)]
    except Refused:
        return
    picture = lines(
        {"gradient": norms}, title="Norm of the gradient, before it is clipped", x="step", y="norm"
    )
    atomic_write_text(folder / "gradient.svg", picture)


def _write(model: Transformer, tokenizer_folder: Path, out: Path) -> None:
    own = state_of(model)
    state = {name: tensor.to(format_of(name, torch.bfloat16)) for name, tensor in own.items()}
    with atomic_directory(out) as partial:
        config = config_json(model.config)
        for file in sorted(tokenizer_folder.iterdir()):
            if file.is_file() and file.suffix in (".json", ".jinja"):
                atomic_write_text(partial / file.name, file.read_text(encoding="utf-8"))
        tokenizer = Tokenizer.load(partial)
        ends = {
            "eos_token_id": tokenizer.eos_ids[0] if tokenizer.eos_ids else None,
            "pad_token_id": tokenizer.pad_id,
        }
        save_checkpoint(partial, state, config | ends)
        atomic_write_text(partial / "generation_config.json", json.dumps(ends, indent=2) + "\n")
