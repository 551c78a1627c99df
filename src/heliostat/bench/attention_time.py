"""What a kind of attention costs a training step beside softmax: all kinds in turn, each turn in another order.

``python -m heliostat.bench.attention_time SIZE`` says it as JSON. Ratios are taken within a turn, so that what slows the
machine for a while slows both. ``decode_kinds`` measures a decode step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from heliostat.bench.stepping import timed
from heliostat.bench.trial_attention import KINDS
from heliostat.build import best_dtype, device_named
from heliostat.model.alpha import settle
from heliostat.model.transformer import Transformer
from heliostat.train.loop import Settings, make_optimizer, take_step
from heliostat.train.pretrain import new_model
from heliostat.train.pretrain_recipe import PretrainRecipe
from heliostat.train.text import PackedRows, TextObjective

WARM, LEAST = 2, 5
PLAIN = "softmax"
LENGTH = 512
"""Tokens of the longest text, and N where it is fixed."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a model and of its training step."""

    hidden_size: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    length: int


SHAPES: Mapping[str, Shape] = {
    "1M": Shape(128, 4, 4, 2048, rows=4, length=256),
    "25M": Shape(512, 8, 8, 8192, rows=1, length=512),
}
"""That of the trials, and one whose products outweigh what is paid for every operation."""


def model_of(kind: str, shape: Shape) -> Transformer:
    """A fresh model of a kind, as pretraining makes it."""
    recipe = PretrainRecipe(
        output_dir="none",
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2,
        intermediate_size=3 * shape.hidden_size,
        max_length=LENGTH,
        max_position_embeddings=LENGTH,
        **KINDS[kind],  # type: ignore[arg-type]
    )
    return new_model(recipe.resolve(bf16=True), shape.vocabulary)


def training(shape: Shape, *, repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of a whole training step by kind, one a turn."""
    ids = torch.randint(shape.vocabulary, (64, shape.length), generator=torch.Generator().manual_seed(0))
    rows = PackedRows.of(ids.tolist(), shape.length)
    settings = Settings(steps=1_000, learning_rate=1e-4, bf16=best_dtype(device) is torch.bfloat16)
    steps: dict[str, Callable[[int], None]] = {}
    for kind in KINDS:
        model = model_of(kind, shape).to(device)
        objective = TextObjective(model, rows, shape.rows, 1, 0)
        steps[kind] = partial(_step, model, objective, settings, _optimizer(model, settings))
    return in_turn({kind: partial(_timed, step, device) for kind, step in steps.items()}, repeats)


def _optimizer(model: Transformer, settings: Settings) -> torch.optim.Optimizer:
    return make_optimizer(dict(model.named_parameters()), settings)


def _step(
    model: Transformer,
    objective: TextObjective,
    settings: Settings,
    optimizer: torch.optim.Optimizer,
    turn: int,
) -> None:
    take_step(objective.micros(turn), dict(model.named_parameters()), optimizer, turn, settings)
    settle(model)


def _timed(step: Callable[[int], None], device: str, turn: int) -> float:
    return timed(partial(step, turn), device)


def in_turn(runs: Mapping[str, Callable[[int], float]], repeats: int) -> dict[str, list[float]]:
    """What each run says in every turn but the first few; who begins changes from turn to turn."""
    found: dict[str, list[float]] = {kind: [] for kind in runs}
    names = list(runs)
    for turn in range(WARM + repeats):
        for place in range(len(names)):
            kind = names[(place + turn) % len(names)]
            found[kind].append(runs[kind](turn))
    return {kind: seconds[WARM:] for kind, seconds in found.items()}


def beside(found: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """By kind: median seconds, and the median of its ratios to softmax in the same turn, with the least and most."""
    table = {}
    for kind, seconds in found.items():
        ratios = [a / b for a, b in zip(seconds, found[PLAIN], strict=True)]
        table[kind] = {
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
        }
    return table


def main() -> None:
    """Measure one size; what is printed is the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    if given.repeats < LEAST:
        parser.error(f"--repeats {given.repeats}: a median needs at least {LEAST}")
    torch.set_num_threads(given.threads)
    found = beside(training(SHAPES[given.size], repeats=given.repeats, device=device_named(given.device)))
    facts = {"size": given.size, "repeats": given.repeats, "threads": given.threads}
    print(json.dumps({**facts, "kinds": found}))


if __name__ == "__main__":
    main()
