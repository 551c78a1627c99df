"""What the loop is told is what the recipes of both kinds say."""

from typing import Any

import pytest

from heliostat.train.pretrain_recipe import PretrainRecipe
from heliostat.train.recipe import Recipe
from heliostat.train.settings import identity_of, settings_of
from heliostat.train.spellings import make_recipe

SAID: dict[str, Any] = {
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "decay_ratio": 0.25,
    "weight_decay": 0.125,
    "adam_beta1": 0.5,
    "adam_beta2": 0.75,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 2.0,
    "bf16": True,
    "logging_steps": 3,
    "eval_steps": 4,
    "save_steps": 5,
    "save_total_limit": 6,
}


@pytest.mark.parametrize("kind", [Recipe, PretrainRecipe])
def test_every_setting_comes_from_the_recipe(kind: Any) -> None:
    needed = {"family": "f", "member": "m", "sharing": "sun", "data": "d"}
    recipe = make_recipe(kind, {**(needed if kind is Recipe else {"output_dir": "o"}), **SAID})
    settled = recipe.resolve(bf16=False, **({"hidden_size": 8} if kind is Recipe else {}))
    told = settings_of(settled, steps=9, warmup=2)
    assert (told.steps, told.warmup_steps, told.decay_share) == (9, 2, 0.25)
    assert (told.betas, told.epsilon) == ((0.5, 0.75), 1e-3)
    same = set(SAID) - {"decay_ratio", "adam_beta1", "adam_beta2", "adam_epsilon"}
    assert {name: getattr(told, name) for name in same} == {name: SAID[name] for name in same}


def test_an_identity_is_of_the_facts_and_of_no_order() -> None:
    assert identity_of({"a": 1, "b": 2}) == identity_of({"b": 2, "a": 1}) != identity_of({"a": 1, "b": 3})
