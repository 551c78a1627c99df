"""From resolved recipes to what the loop is told, and to the name by which a run knows its own checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol

from heliostat.train.loop import Settings


class Descent(Protocol):
    """What settled recipes of tuning and of pretraining have in common: how they descend, without any `auto`."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def lr_scheduler_type(self) -> str: ...
    @property
    def decay_ratio(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def adam_beta1(self) -> float: ...
    @property
    def adam_beta2(self) -> float: ...
    @property
    def adam_epsilon(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def bf16(self) -> bool: ...
    @property
    def logging_steps(self) -> int: ...
    @property
    def eval_steps(self) -> int: ...
    @property
    def save_steps(self) -> int: ...
    @property
    def save_total_limit(self) -> int: ...


def settings_of(recipe: Descent, *, steps: int, warmup: int) -> Settings:
    """The loop's settings that a resolved recipe asks for."""
    return Settings(
        steps=steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=warmup,
        decay_share=recipe.decay_ratio,
        weight_decay=recipe.weight_decay,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        epsilon=recipe.adam_epsilon,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.bf16,
        logging_steps=recipe.logging_steps,
        eval_steps=recipe.eval_steps,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
    )


def identity_of(facts: Mapping[str, Any]) -> str:
    """What must be equal for a run to go on from a checkpoint (hex)."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
