"""Checkpoints of a member's run: what is refused to go on from, and that a refusal changes nothing."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from heliostat.errors import Refused
from heliostat.train import checkpoint
from heliostat.train.recipe import Recipe
from heliostat.train.spellings import make_recipe
from heliostat.train.tune import tune
from heliostat.train.watch import Silent


class Stopped(Exception):
    """The end of a run that was killed."""


class Killer(Silent):
    """Kills the run at its third step."""

    def step(self, record: Any) -> None:
        if record["step"] == 3:
            raise Stopped


def run(family: Path, data: Path, watch: Silent, **options: Any) -> None:
    who = {"family": str(family), "member": "new", "sharing": "sun", "data": str(data)}
    pace = {"max_steps": 4, "learning_rate": 0.03, "max_length": 128, "save_steps": 2}
    recipe = make_recipe(Recipe, {**who, **pace, **options})
    tune(recipe, watching=lambda job: nullcontext(watch))


def test_a_changed_recipe_is_refused_by_its_fields_and_the_old_one_stays(
    bare_family: Path, tiny_data: Path
) -> None:
    with pytest.raises(Stopped):
        run(bare_family, tiny_data, Killer())
    folder = bare_family / "runs" / "new"
    before = (folder / "recipe.yaml").read_text()
    said = r"another recipe, data or base \(learning_rate was 0.03, is now 0.01; seed was 0, is now 7\); to start"
    with pytest.raises(Refused, match=said):
        run(bare_family, tiny_data, Silent(), learning_rate=0.01, seed=7, logging_steps=1)
    assert (folder / "recipe.yaml").read_text() == before
    run(bare_family, tiny_data, Silent(), logging_steps=1)  # which is free to change
    assert "logging_steps: 1" in (folder / "recipe.yaml").read_text()
    assert checkpoint.checkpoints(folder) == []


def test_changed_data_are_not_taken_for_a_changed_recipe(
    bare_family: Path, tiny_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(tiny_data.read_bytes())
    with pytest.raises(Stopped):
        run(bare_family, data, Killer())
    data.write_text("".join(tiny_data.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(Refused, match="another recipe, data or base; to start over"):
        run(bare_family, data, Silent())
    with pytest.raises(Refused, match="holds no checkpoint"):
        run(bare_family, data, Silent(), member="other", resume_from_checkpoint=True)
