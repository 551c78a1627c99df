"""One measured run of an attention kind: a base from scratch, its losses, its gradients, what its heads look at.

``python -m heliostat.bench.trial_attention --help`` runs one in a process of its own; ``attention`` runs them all.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from heliostat.bench.attention_text import CHOOSE, LEARN, REPORT
from heliostat.files import atomic_directory, atomic_write_text, read_json

KINDS: Mapping[str, Mapping[str, str]] = {
    "softmax": {"attention": "softmax"},
    "sink": {"attention": "sink"},
    "gated": {"attention": "gated"},
    "affine": {"attention": "affine", "n": "visible"},
    "affine-fixed": {"attention": "affine", "n": "fixed"},
    "affine+gated": {"attention": "affine+gated", "n": "visible"},
    "alpha-half": {"attention": "affine", "n": "visible", "alpha": "constant"},
}
"""What is compared, by name, as a recipe says it."""
SIZES: Mapping[str, Mapping[str, int]] = {
    "1M": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "vocab_size": 2048,
        "max_length": 256,
        "per_device_train_batch_size": 4,
    },
    "90M": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "vocab_size": 16384,
        "max_length": 1024,
        "per_device_train_batch_size": 32,
    },
}
"""What a CPU can do in about a minute, and what is meant for a GPU."""
STEPS = 400
LOOKED_AT = 256
"""Tokens of a text's beginning in which heads are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTrial:
    """What is run; two equal trials give equal results."""

    kind: str
    learning_rate: float
    seed: int
    steps: int = STEPS
    size: str = "1M"

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.size}-{self.kind}-{self.learning_rate:g}-s{self.seed}-{self.steps}"


def kept_at(folder: Path, trial: AttentionTrial) -> Path:
    """Where its result lies."""
    return folder / "trials" / f"{trial.name}.json"


def tokenizer_at(folder: Path, size: str) -> Path:
    """The tokenizer of all trials of a size, trained the first time on what they learn from."""
    from heliostat.tasks import tokenizer as made

    target = folder / f"tokenizer-{size}"
    if not target.exists():
        lines = (folder / "text" / f"{LEARN}.jsonl").read_text(encoding="utf-8").splitlines()
        with atomic_directory(target) as partial:
            texts = [json.loads(line)["text"] for line in lines]
            trained = made.train(vocabulary=SIZES[size]["vocab_size"], texts=texts)
            made.save(trained, partial, max_length=SIZES[size]["max_length"])
    return target


def values_of(trial: AttentionTrial, folder: Path, device: str = "auto") -> dict[str, Any]:
    """The recipe that a trial stands for, as a YAML file would say it."""
    shape = SIZES[trial.size]
    return {
        "output_dir": str(folder / "bases" / trial.name),
        "data": [str(folder / "text" / f"{LEARN}.jsonl")],
        "eval_data": str(folder / "text" / f"{CHOOSE}.jsonl"),
        "tokenizer": str(folder / f"tokenizer-{trial.size}"),
        **KINDS[trial.kind],
        **shape,
        "max_position_embeddings": shape["max_length"],
        "max_steps": trial.steps,
        "learning_rate": trial.learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "warmup_ratio": 0.05,
        "decay_ratio": 0.2,
        "bf16": True,
        "seed": trial.seed,
        "device": device,
    }


def run(trial: AttentionTrial, folder: Path, *, device: str = "auto") -> dict[str, Any]:
    """Train and measure; the result is kept, a finished trial is not run again, one that was cut goes on."""
    kept = kept_at(folder, trial)
    if kept.exists():
        return read_json(kept)
    from heliostat.train.pretrain import pretrain
    from heliostat.train.pretrain_recipe import PretrainRecipe
    from heliostat.train.spellings import make_recipe
    from heliostat.train.step_log import NAME, read_steps
    from heliostat.train.watch import Silent

    begin = time.perf_counter()
    base = folder / "bases" / trial.name
    log = base.with_name(f"{base.name}.run") / NAME
    if not base.exists():
        recipe = make_recipe(PretrainRecipe, values_of(trial, folder, device))
        pretrain(recipe, watching=lambda settled: nullcontext(Silent()))
    steps = read_steps(log)
    judged = json.loads((log.with_name("log.jsonl")).read_text(encoding="utf-8").splitlines()[-1])
    result = {
        "trial": asdict(trial),
        "choose": judged["eval_loss"],
        "tokens": sum(record["tokens"] for record in steps),
        "loss": [round(record["loss"], 5) for record in steps],
        "grad_norm": [round(record["grad_norm"], 6) for record in steps],
        **_measured(folder, base),
        "seconds": round(time.perf_counter() - begin, 2),
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(kept, json.dumps(result) + "\n")
    shutil.rmtree(base, ignore_errors=True)  # what was to be known of it is known
    shutil.rmtree(log.parent, ignore_errors=True)
    return result


def _measured(folder: Path, base: Path) -> dict[str, Any]:
    """The base as it was saved: its loss on the report's texts, and what its heads look at there."""
    import torch

    from heliostat.bench.attention_facts import look
    from heliostat.model.config import read_config
    from heliostat.model.tokenizer import Tokenizer
    from heliostat.model.weights import load_transformer
    from heliostat.train.data import document_ids
    from heliostat.train.formats import read_jsonl
    from heliostat.train.text import PackedRows, text_loss

    tokenizer, config = Tokenizer.load(base), read_config(base)
    model = load_transformer(base, config, dtype=torch.float32)
    records = read_jsonl(folder / "text" / f"{REPORT}.jsonl").records
    documents = [document_ids(record, tokenizer) for record in records]
    seen = min(config.max_length, LOOKED_AT)
    rows = [ids[:seen] for ids in documents if len(ids) >= seen]
    return {
        "report": text_loss(model, PackedRows.of(documents, config.max_length)),
        "parameters": config.parameters,
        **look(model, torch.tensor(rows)),
    }


def main() -> None:
    """Run one trial from the command line; what is printed is its result in short."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--size", choices=SIZES, default="1M")
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = vars(parser.parse_args())
    import torch

    torch.set_num_threads(given["threads"])
    trial = AttentionTrial(**{field.name: given[field.name] for field in fields(AttentionTrial)})
    result = run(trial, given["folder"], device=given["device"])
    print(json.dumps({"name": trial.name, CHOOSE: result["choose"], REPORT: result["report"]}))


if __name__ == "__main__":
    main()
