"""Make a base from scratch: text to tokenizer to packed rows to a checkpoint in Hugging Face's layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heliostat.build import best_dtype, device_named
from heliostat.errors import Refused
from heliostat.files import atomic_directory, atomic_write_text, locked
from heliostat.model.config import config_json, parse_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.model.weights import save_checkpoint, state_of
from heliostat.tasks import corpus
from heliostat.tasks import tokenizer as made
from heliostat.train import checkpoint
from heliostat.train.data import document_ids
from heliostat.train.formats import Record, read_jsonl
from heliostat.train.loop import Run, Watch
from heliostat.train.pretrain_recipe import PretrainRecipe, SettledPretraining
from heliostat.train.settings import identity_of, settings_of
from heliostat.train.spellings import to_yaml
from heliostat.train.text import PackedRows, TextObjective, text_loss
from heliostat.train.track import check_tracker, tracking
from heliostat.train.watch import draw_loss

EMBEDDED = "embedded"
HELD_OUT_SHARE = 0.01
MOST_TOKENS = 16_000_000
"""Tokens of the built-in corpus that are made at most; a longer run reads them again."""
TOKENIZER_TEXTS = 20_000


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
) -> Pretrained:
    """Run a recipe to its end; an unfinished run of the same recipe goes on.

    Checkpoints, log and picture lie in ``<output_dir>.run``. Raises Refused for data or shapes that do not fit.
    """
    device = device_named(recipe.device)
    settled = recipe.resolve(bf16=best_dtype(device) is torch.bfloat16, device=device)
    check_tracker(settled.report_to)
    out = Path(recipe.output_dir)
    if out.exists():
        raise Refused(f"{out} is already there; choose another output_dir, or remove it first")
    run_folder = out.with_name(f"{out.name}.run")
    run_folder.mkdir(parents=True, exist_ok=True)
    with locked(run_folder / "run.lock", wait=False):
        tokenizer_folder = _tokenizer(settled, run_folder)
        tokenizer = Tokenizer.load(tokenizer_folder)
        rows, held_out = _rows(settled, tokenizer, echo)
        model = new_model(settled, max(tokenizer.size, settled.vocab_size)).to(device)
        with watching(settled) as watch, tracking(settled, watch, run_folder, out.name, tell=echo) as both:
            history = _run(settled, model, rows, held_out, run_folder, tokenizer.digest, both)
        _write(settled, model, tokenizer_folder, out)
        atomic_write_text(run_folder / "recipe.yaml", to_yaml(settled))
        draw_loss(history, run_folder / "loss.svg", title=f"pretraining {out.name}")
        for old in checkpoint.checkpoints(run_folder):
            checkpoint.discard(old)
    return Pretrained(out, history, model.config.parameters, settled.tokens_per_batch * settled.max_steps)


def new_model(recipe: SettledPretraining, vocabulary: int) -> Transformer:
    """A fresh model of the recipe's shape: matrices normal by their input width, branches' ends smaller with depth."""
    torch.manual_seed(recipe.seed)
    model = Transformer(parse_config(shape_of(recipe, vocabulary)))
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        spread = 0.02 if "embed_tokens" in name or "lm_head" in name else parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            spread /= (2 * recipe.num_hidden_layers) ** 0.5
        torch.nn.init.normal_(parameter, std=spread)
    return model


def shape_of(recipe: SettledPretraining, vocabulary: int) -> dict[str, Any]:
    """The recipe's shape as config.json says it."""
    return {
        "model_type": recipe.architecture,
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


def _run(
    recipe: SettledPretraining,
    model: Transformer,
    rows: PackedRows,
    held_out: PackedRows,
    folder: Path,
    tokenizer: str,
    watch: Watch,
) -> tuple[Mapping[str, Any], ...]:
    objective = TextObjective(
        model, rows, recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps, recipe.seed
    )
    model.checkpointing = recipe.gradient_checkpointing
    ignored = {
        "output_dir",
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "eval_steps",
        "device",
    }
    data = hashlib.sha256(rows.ids.numpy().data).hexdigest()
    # report_to as runs say that were begun before it could be anything else.
    facts = {"tokenizer": tokenizer, "rows": data, "report_to": "none"}
    identity = identity_of(recipe.model_dump(exclude=ignored) | facts)

    def judge() -> dict[str, float]:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=recipe.bf16):
            return {"loss": text_loss(model, held_out)}

    settings = settings_of(recipe, steps=recipe.max_steps, warmup=recipe.warmup_steps())
    if recipe.resume_from_checkpoint is True and not checkpoint.checkpoints(folder):
        raise Refused(f"--resume-from-checkpoint true, but {folder} holds no checkpoint")
    run = Run(objective, dict(model.named_parameters()), settings, folder, identity, watch, judge)
    return run.fit(resume=recipe.resume_from_checkpoint is not False).history


def _tokenizer(recipe: SettledPretraining, run_folder: Path) -> Path:
    """The folder of the tokenizer: the given one, or one trained now and kept with the run."""
    if recipe.tokenizer is not None:
        return Path(recipe.tokenizer)
    folder = run_folder / "tokenizer"
    if not folder.exists():
        texts = None if recipe.data == (EMBEDDED,) else _texts(recipe)
        with atomic_directory(folder) as partial:
            trained = made.train(vocabulary=recipe.vocab_size, texts=texts)
            made.save(trained, partial, max_length=recipe.max_position_embeddings)
    return folder


def _texts(recipe: SettledPretraining) -> Iterator[str]:
    for path in recipe.data:
        if path == EMBEDDED:
            yield from (corpus.rendered(d) for d in corpus.documents(recipe.seed, TOKENIZER_TEXTS))
        elif path.endswith(".jsonl"):
            for record in read_jsonl(path).records:
                yield record.text or "\n".join(turn.content for turn in record.turns)
        else:
            yield from paragraphs(Path(path))


def paragraphs(path: Path) -> list[str]:
    """A text file cut at empty lines; refused, by name and position, where it is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Refused(f"{path} is missing") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not UTF-8: byte at position {error.start}") from error
    found = [part.strip() for part in text.split("\n\n") if part.strip()]
    if not found:
        raise Refused(f"{path} holds no text")
    return found


def _rows(
    recipe: SettledPretraining, tokenizer: Tokenizer, echo: Callable[[str], None]
) -> tuple[PackedRows, PackedRows]:
    """Rows to learn from and rows held out."""
    documents: list[list[int]] = []
    for path in recipe.data:
        documents += _embedded(recipe, tokenizer) if path == EMBEDDED else _from_file(path, tokenizer)
    if recipe.eval_data is not None:
        held_out = _from_file(recipe.eval_data, tokenizer)
    else:
        documents, held_out = _parted(documents)
    rows = PackedRows.of(documents, recipe.max_length)
    echo(f"{len(documents):,} documents, {rows.ids.numel():,} tokens in rows of {recipe.max_length}")
    return rows, PackedRows.of(held_out, min(recipe.max_length, sum(map(len, held_out))))


def _parted(documents: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """What is learned and what is held out: whole documents, or the end of the only one."""
    if len(documents) == 1:
        cut = max(2, round(len(documents[0]) * HELD_OUT_SHARE))  # of one token nothing is spoken
        return [documents[0][:-cut]], [documents[0][-cut:]]
    cut = max(1, round(len(documents) * HELD_OUT_SHARE))
    return documents[cut:], documents[:cut]


def _embedded(recipe: SettledPretraining, tokenizer: Tokenizer) -> list[list[int]]:
    """The built-in corpus: as much as the run reads, up to MOST_TOKENS."""
    wanted = min(MOST_TOKENS, round(1.02 * recipe.max_steps * recipe.tokens_per_batch))
    documents: list[list[int]] = []
    seen = 0
    stream = corpus.documents(recipe.seed, wanted)
    while seen < wanted:
        texts = [corpus.rendered(next(stream)) for _ in range(4096)]
        batch = [e.ids for e in tokenizer.backend.encode_batch(texts, add_special_tokens=False)]
        documents, seen = documents + batch, seen + sum(map(len, batch))
    return documents


def _from_file(path: str, tokenizer: Tokenizer) -> list[list[int]]:
    if not path.endswith(".jsonl"):
        return [document_ids(Record(text=part), tokenizer) for part in paragraphs(Path(path))]
    found = []
    for record in read_jsonl(path).records:
        try:
            found.append(_document(record, tokenizer))
        except Refused as reason:
            raise Refused(f"{path}:{record.line}: {reason}") from reason
    return found


def _document(record: Record, tokenizer: Tokenizer) -> list[int]:
    """A text, or a conversation as its template writes it."""
    if record.text is not None:
        return document_ids(record, tokenizer)
    return tokenizer.encode(tokenizer.render([t.message for t in record.turns], generation=False))


def _write(recipe: SettledPretraining, model: Transformer, tokenizer_folder: Path, out: Path) -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in state_of(model).items()}
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
