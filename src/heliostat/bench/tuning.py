"""Tuners side by side: time of a step, what is kept for the backward pass, memory, longest sequence, loss.

Every case steps in turn, on one transformer of chance and the same tokens; medians. Dropped branches stand beside the
measured-term model: of a step at rate 0 only the branches' backward pass shrinks.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from heliostat.bench.stepping import (
    FROZEN,
    FULL,
    LORA,
    PACA,
    PEFT_DORA,
    PEFT_LORA,
    PEFT_PACA,
    TUNERS,
    Case,
    Phases,
    Tuned,
    Work,
    has_peft_paca,
)
from heliostat.bench.trial import Trial, ensure_family, recipe_of, write_data
from heliostat.build import best_dtype, device_named
from heliostat.errors import Refused
from heliostat.files import atomic_write_text, read_json
from heliostat.model.config import ModelConfig, parse_config
from heliostat.train.droprates import check_rate
from heliostat.train.job import objective_of, prepare
from heliostat.train.loop import make_optimizer, take_step
from heliostat.train.settings import settings_of

WARM = 2
MIB = 2**20
LOSS_RATES = {FULL: 2e-3, LORA: 6e-3, PACA: 1e-2}
"""Learning rates of the short runs whose losses are compared."""
LOSSES = "tuning-losses.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is measured."""

    tuners: tuple[str, ...] = (FULL, LORA, PACA)
    rates: tuple[float, ...] = (0.0, 0.5, 0.75, 0.875)
    r: int = 16
    peft: bool = True
    """PEFT's LoRA and DoRA beside ours, and its PaCA where it has one."""
    repeats: int = 7
    hidden_size: int = 512
    layers: int = 8
    vocabulary: int = 8192
    batch: int = 4
    length: int = 256
    spoken: int = 64
    loss_steps: int = 60
    budget_mib: int = 1024
    device: str = "auto"

    def checked(self) -> Wish:
        """The same; refused where something cannot be measured."""
        if unknown := sorted(set(self.tuners) - set(TUNERS)):
            raise Refused(f"tuners {', '.join(unknown)}: there are {', '.join(TUNERS)}")
        for rate in self.rates:
            check_rate(rate)
        if 0.0 not in self.rates:
            raise Refused(
                f"dropbp {', '.join(f'{r:g}' for r in self.rates)}: 0 must be among them, to compare with"
            )
        if self.spoken > self.length:
            raise Refused(f"spoken {self.spoken}: more than the {self.length} tokens of a row")
        if self.repeats < 5:
            raise Refused(f"repeats {self.repeats}: a median needs at least 5")
        return self

    @property
    def config(self) -> ModelConfig:
        """A Llama of this width and depth."""
        heads = max(1, self.hidden_size // 64)
        return parse_config(
            {
                "model_type": "llama",
                "vocab_size": self.vocabulary,
                "hidden_size": self.hidden_size,
                "num_hidden_layers": self.layers,
                "num_attention_heads": heads,
                "num_key_value_heads": max(1, heads // 2) if heads % 2 == 0 else heads,
                "intermediate_size": 32 * round(self.hidden_size * 2.75 / 32),
                "max_position_embeddings": 1 << 20,
                "rms_norm_eps": 1e-6,
                "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
            }
        )

    def tuned(self) -> list[tuple[str, int | None]]:
        """Tuners with their ranks: columns at equal rank and at equal parameters, what bounds adapters, PEFT's last."""
        found: list[tuple[str, int | None]] = []
        for tuner in self.tuners:
            if tuner == PACA:
                found += [(PACA, self.r), (PACA, 2 * self.r)]
            else:
                found.append((tuner, None if tuner in (FULL, FROZEN) else self.r))
        if FROZEN not in self.tuners and set(self.tuners) - {FULL}:
            found.append((FROZEN, None))
        if self.peft:
            own = [PEFT_PACA] if has_peft_paca() else []
            found += [(name, self.r) for name in (PEFT_LORA, PEFT_DORA, *own) if name not in self.tuners]
        return found


def measure(wish: Wish, console: Console) -> dict[str, Any]:
    """Times, memory and phases; all cases step in turn."""
    device = device_named(wish.device)
    bf16 = best_dtype(device) is torch.bfloat16
    work = Work(wish.config, wish.batch, wish.length, wish.spoken, bf16, device)
    models = {pair: Tuned(work, *pair) for pair in wish.tuned()}
    cases = {pair: _cases(pair, wish) for pair in models}
    console.print(
        f"{sum(map(len, cases.values()))} cases of {work.config.parameters:,} parameters, "
        f"{wish.repeats} steps each in turn"
    )
    seconds: dict[Case, list[float]] = {}
    phases: dict[tuple[str, int | None], list[Phases]] = {pair: [] for pair in models}
    for repeat in range(WARM + wish.repeats):
        for pair, model in models.items():
            for case in cases[pair]:
                seconds.setdefault(case, []).append(model.step(case))
            phases[pair].append(model.phases())
        console.print(f"{repeat + 1}/{WARM + wish.repeats}")
    rows = [
        _row(case, model, seconds, _median(phases[pair][WARM:]), wish)
        for pair, model in models.items()
        for case in cases[pair]
    ]
    parts = {Case(*pair).name: asdict(_median(found[WARM:])) for pair, found in phases.items()}
    return {"rows": rows, "phases": parts}


def _cases(pair: tuple[str, int | None], wish: Wish) -> list[Case]:
    """PEFT's stand at rate 0; the bound and columns of the smaller rank, too."""
    tuner, r = pair
    compared = tuner.startswith("peft-") or tuner == FROZEN or (tuner == PACA and r == wish.r)
    rates = (0.0,) if compared else wish.rates
    return [Case(tuner, r, rate, again) for again, rate in product((False, True), rates)]


def _median(found: Sequence[Phases]) -> Phases:
    return Phases(*(statistics.median(getattr(p, name) for p in found) for name in Phases.__slots__))


def _row(
    case: Case, model: Tuned, seconds: Mapping[Case, Sequence[float]], parts: Phases, wish: Wish
) -> dict[str, Any]:
    alone = Case(case.tuner, case.r, 0.0, case.checkpointing)
    took = statistics.median(seconds[case][WARM:])
    low_rank = [Case(name, wish.r, 0.0, case.checkpointing) for name in (LORA, PEFT_LORA)]
    kept, fixed = model.kept(case), model.fixed()
    return {
        "case": case.name,
        **asdict(case),
        "trained": sum(p.numel() for p in model.parameters.values()),
        "seconds": took,
        "low": min(seconds[case][WARM:]),
        "high": max(seconds[case][WARM:]),
        "ratio": _beside(seconds[case], seconds[alone]),
        "speeds": {one.name: _beside(seconds[one], seconds[case]) for one in low_rank if one in seconds},
        "predicted": None if case.checkpointing or not case.dropbp else parts.ratio(case.dropbp),
        "reckoned": None if case.checkpointing or not case.dropbp else parts.whole_ratio(case.dropbp),
        "kept": kept,
        "fixed": fixed,
        "total": kept + fixed,
        "longest": model.longest(case, wish.budget_mib * MIB),
    }


def _beside(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median ratio of two cases' times in the same turn: what slows the machine for a while slows both."""
    return statistics.median(a / b for a, b in zip(ours[WARM:], theirs[WARM:], strict=True))


def kept_losses(wish: Wish, out: Path, console: Console) -> dict[str, list[tuple[int, float]]]:
    """The losses; those that this very wish left in ``out`` are not trained for again."""
    path = out / LOSSES
    key = [list(wish.tuners), list(wish.rates), wish.r, wish.loss_steps]
    if path.exists() and read_json(path)["of"] == key:
        return dict(read_json(path)["losses"])
    found = losses(wish, console) if wish.loss_steps else {}
    if found:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps({"of": key, "losses": found}) + "\n")
    return found


def losses(wish: Wish, console: Console) -> dict[str, list[tuple[int, float]]]:
    """Training losses of short runs on the embedded base and task, by sensitivity where branches are dropped."""
    found: dict[str, list[tuple[int, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ensure_family(folder)
        for tuner, rate in product([t for t in wish.tuners if t in LOSS_RATES], wish.rates):
            trial = Trial(
                task="tools",
                sharing="independent",
                tuner=tuner,
                learning_rate=LOSS_RATES[tuner],
                seed=0,
                steps=wish.loss_steps,
                r=2 * wish.r if tuner == PACA else wish.r,
                dropbp=rate,
                train_items=32 * wish.loss_steps,
            )
            case = Case(tuner, None if tuner == FULL else trial.r, rate).name
            found[case] = _curve(trial, folder)
            console.print(f"{case}: loss {found[case][-1][1]:.3f} after {wish.loss_steps} steps")
    return found


def _curve(trial: Trial, folder: Path) -> list[tuple[int, float]]:
    job = prepare(recipe_of(trial, folder, write_data(trial, folder)["train"]))
    job.run_folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(job.recipe, steps=job.steps, warmup=job.recipe.warmup_steps(job.steps))
    objective, optimizer = objective_of(job), make_optimizer(job.parameters, settings)
    return [
        (
            step + 1,
            take_step(objective.micros(step), job.parameters, optimizer, step, settings)["loss"],
        )
        for step in range(job.steps)
    ]
