"""How long a training step takes beside what its tokens cost: no row pays for a module it does not use.

The cost model of a row is the time of the bare passes it asks for, measured alone on the same tensors: each module's
forward (and backward, where it is on the tape) over exactly the tokens that the row sends through it, the head over
the spoken tokens and the optimizer's step. The whole step, data and bookkeeping included, is measured beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from heliostat.bench.birth import certificate
from heliostat.bench.trial import EMBEDDED_BASE, Trial, ensure_family, recipe_of, write_data
from heliostat.files import atomic_write_text
from heliostat.model.seam import Causal
from heliostat.ops.mixing import NOTHING, Mix
from heliostat.train.loop import Settings, make_optimizer, take_step
from heliostat.train.objective import MemberObjective
from heliostat.train.sharing import Layout
from heliostat.train.tune import Job, objective_of, prepare, settings_of

LIMIT = 1.2
CASES = (
    ("independent", "full"),
    ("sun", "full"),
    ("prefillshare", "full"),
    ("icarus", "full"),
    ("independent", "lora"),
    ("icarus", "lora"),
)


def measure(job: Job, *, repeats: int) -> tuple[float, float]:
    """(seconds of a whole step, seconds of the cost model), medians of steps timed in turn."""
    objective = objective_of(job)
    settings = settings_of(job.recipe, steps=10_000, warmup=0)
    optimizer = make_optimizer(job.parameters, settings)
    whole, model = [], []
    for step in range(repeats + 2):
        micros = objective.micros(step)
        model.append(_timed(partial(_passes, job, micros[0].layout, optimizer)))
        whole.append(_timed(partial(_step, job, objective, optimizer, step, settings)))
    return statistics.median(whole[2:]), statistics.median(model[2:])


def _step(
    job: Job, objective: MemberObjective, optimizer: torch.optim.Optimizer, step: int, settings: Settings
) -> None:
    take_step(objective.micros(step), job.parameters, optimizer, step, settings)


def _passes(job: Job, layout: Layout, optimizer: torch.optim.Optimizer) -> None:
    """Every module once over its tokens, as plain causal passes of the same padded shapes, and nothing between them."""
    shapes = {job.row.prompt_writer: layout.prompt.shape}
    if layout.answers is not None:
        for name in (job.row.answer_writer, job.row.speaker):
            shapes.setdefault(name, layout.answers.ids.shape)
    said = Counter({job.row.prompt_writer: layout.from_prompt[0].numel()})
    said[job.row.speaker] += layout.from_answers[0].numel()
    for name, (count, length) in shapes.items():
        module = job.modules[name]
        trained = name == job.own
        taped = (
            trained or job.row.prompt_writer == job.own
        )  # behind a trained writer a frozen speaker is on the tape
        ids = torch.zeros(count, length, dtype=torch.long)
        positions = torch.arange(length).expand(count, length)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=job.recipe.bf16),
            torch.set_grad_enabled(taped),
        ):
            seam = Causal() if trained or not taped else _Taped()
            hidden = module.model(ids, positions, seam, module.route)
            if spoken := said.get(name, 0):
                logits = module.model.logits(hidden.flatten(0, 1)[:spoken]).float()
                hidden = torch.nn.functional.cross_entropy(logits, layout.targets[:spoken])
        if taped:
            hidden.sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class _Taped:
    """Plain attention over keys and values that want a gradient, as those of a trained writer do."""

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mix: Mix = NOTHING
    ) -> torch.Tensor:
        k, v = (each.requires_grad_() if each.is_leaf else each for each in (k, v))
        return Causal()(layer, q, k, v, mix)


def _timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _page(rows: Mapping[str, Mapping[str, Any]], birth: Mapping[str, Any]) -> str:
    """The table as a page."""
    lines = [
        "# A training step beside its cost model",
        "",
        "The cost model of a row is the time of the bare passes that it asks for, over the same padded tensors, and the",
        f"optimizer's step; limit {LIMIT}. Medians of {birth['repeats']} steps, timed in turn; batch 32, task `tools`.",
        "",
        f"`{birth['command']}`; {birth['hardware']}, {birth['threads']} threads; commit {birth['commit']}; {birth['date']}",
        "",
        "| sharing, tuner | step | cost model | ratio |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['step'] * 1e3:.0f} ms | {row['model'] * 1e3:.0f} ms | {row['ratio']:.2f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=EMBEDDED_BASE)
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    rows: dict[str, Mapping[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ensure_family(folder, given.base)
        for sharing, tuner in CASES:
            trial = Trial(
                task="tools",
                sharing=sharing,
                tuner=tuner,
                learning_rate=1e-4,
                seed=0,
                steps=1,
                train_items=2_000,
            )
            job = prepare(recipe_of(trial, folder, write_data(trial, folder)["train"]))
            step, model = measure(job, repeats=given.repeats)
            rows[f"{sharing}, {tuner}"] = {"step": step, "model": model, "ratio": step / model}
            print(
                f"{sharing:14s} {tuner:5s} step {step * 1e3:7.1f} ms, cost model {model * 1e3:7.1f} ms, {step / model:.2f}x"
            )
    birth = certificate(
        f"python -m heliostat.bench.step_time --repeats {given.repeats}", repeats=given.repeats
    )
    given.docs.mkdir(parents=True, exist_ok=True)
    atomic_write_text(
        given.docs / "step-time.json", json.dumps({"birth": birth, "rows": rows}, indent=1) + "\n"
    )
    atomic_write_text(given.docs / "step-time.md", _page(rows, birth))


if __name__ == "__main__":
    main()
