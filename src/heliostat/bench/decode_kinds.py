"""A decode step of the engine under each kind of attention, beside softmax: same shape, same requests, in turn.

``python -m heliostat.bench.decode_kinds 24M`` prints JSON: the median seconds of a step, and of its ratio to softmax's
step of the same turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from heliostat.bench.birth import certificate
from heliostat.bench.decode import SHAPES, STEPS, Ours, prompts, shape
from heliostat.build import best_dtype
from heliostat.model.alpha import KEPT_WHOLE
from heliostat.model.config import parse_config
from heliostat.model.transformer import Transformer

KINDS = ("softmax", "softmax again", "affine", "affine+gated", "gated", "sink")
"""The second is the first once more: how far its ratio is from 1 says what a ratio here can say."""


def model_of(name: str, kind: str) -> Transformer:
    """A model of random weights, joined later; alpha and gates are as if trained."""
    own: dict[str, Any] = {"model_type": "heliostat_llama", "attention": {"kind": kind}}
    model = Transformer(parse_config(shape(name) | own))
    for part, tensor in model.state_dict().items():
        if part.endswith(KEPT_WHOLE):
            tensor.fill_(0.5)
        elif tensor.dim() > 1:
            torch.nn.init.normal_(tensor, std=tensor.shape[1] ** -0.5)
    averages = {part: tensor.clone() for part, tensor in model.named_buffers() if part.endswith(KEPT_WHOLE)}
    model = model.to(best_dtype()).requires_grad_(False).eval()
    for part, tensor in averages.items():  # stay float32, as where they are loaded
        model.get_submodule(part.rpartition(".")[0]).register_buffer("alpha_ma", tensor)
    return model


def compare(name: str, kinds: Sequence[str], batches: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Engines take their steps in turn, so that whatever slows the machine slows them all; a ratio is of one turn.

    Each round makes all engines anew, each time in another order, since where weights come to lie costs time, too.
    """
    turns: dict[int, list[dict[str, float]]] = {batch: [] for batch in batches}
    for number in range(rounds):
        order = [kinds[(place + number) % len(kinds)] for place in range(len(kinds))]
        engines = {kind: Ours(model_of(name, kind.partition(" ")[0])) for kind in order}
        for batch in batches:
            turns[batch] += _turns(engines, batch, number)
    found: list[dict[str, Any]] = []
    for batch, all_turns in turns.items():
        for kind in kinds:
            ratio = statistics.median(turn[kind] / turn[kinds[0]] for turn in all_turns)
            took = statistics.median(turn[kind] for turn in all_turns)
            facts = {"batch": batch, "kind": kind, "turns": len(all_turns)}
            found.append(facts | {"seconds": round(took, 6), "ratio": round(ratio, 4)})
    return found


def _turns(engines: Mapping[str, Ours], batch: int, seed: int) -> list[dict[str, float]]:
    """Seconds of the decode steps of one batch of requests, by engine."""
    asked, names = prompts(batch, seed), list(engines)
    for each in engines.values():
        each.add(asked, STEPS + 1)
    found: list[dict[str, float]] = []
    while any(each.engine.unfinished for each in engines.values()):
        turn: dict[str, float] = {}
        for name in names:
            begin = time.perf_counter()
            if len(engines[name].engine.step()) == batch:
                turn[name] = time.perf_counter() - begin
        names.append(names.pop(0))  # nobody always comes behind the same
        if len(turn) == len(engines):
            found.append(turn)
    return found[1:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.manual_seed(0)
    rows = compare(asked.shape, asked.kinds, asked.batches, asked.rounds)
    print(
        json.dumps(
            {"shape": asked.shape, "rounds": asked.rounds, "steps": rows, **certificate(" ".join(sys.argv))},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
