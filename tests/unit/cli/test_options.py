"""Options come from the fields of recipes: none is missing, none is said twice, flags override files."""

from pathlib import Path
from typing import Any

import pytest
import typer

from heliostat.bench.records import Limits
from heliostat.bench.traces import Replay
from heliostat.bench.workloads import Lengths, Load
from heliostat.cli import app
from heliostat.cli.options import attribute_docs
from heliostat.cli.training import recipe_of
from heliostat.engine.request import Sampling
from heliostat.errors import Refused
from heliostat.train.pretrain_recipe import PretrainRecipe
from heliostat.train.recipe import Pace, Recipe
from heliostat.train.spellings import SPELLINGS


def test_every_field_of_a_load_is_an_option_of_bench() -> None:
    measuring = typer.main.get_command(app).commands["bench"].commands  # type: ignore[attr-defined]
    for name, kinds in {"client": (Load, Lengths, Limits), "replay": (Replay, Limits)}.items():
        found = {p.name: p for p in measuring[name].params}
        fields = {field for kind in kinds for field in kind.__dataclass_fields__} - {"lengths"}
        assert fields <= set(found)
        assert "[default: 120.0]" in found["timeout"].help and "``" not in found["assignment"].help


def options(name: str) -> dict[str, Any]:
    """The options of a command by the name of what they set."""
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    return {p.name: p for p in command.params}


@pytest.mark.parametrize(("name", "recipe"), [("train", Recipe), ("pretrain", PretrainRecipe)])
def test_every_field_of_a_recipe_is_an_option(name: str, recipe: type[Pace]) -> None:
    found = options(name)
    for field, facts in recipe.model_fields.items():
        assert f"--{field.replace('_', '-')}" in found[field].opts
        assert found[field].help.startswith(facts.description)
        assert ("[default: " in found[field].help) == (not facts.is_required() and facts.default is not None)


def test_every_field_of_sampling_is_an_option_of_generate_and_chat() -> None:
    for name in ("generate", "chat"):
        found = options(name)
        for field, text in attribute_docs(Sampling).items():
            assert found[field].help.startswith(text)
        assert set(Sampling.__dataclass_fields__) <= set(found)


def test_options_that_may_be_given_several_times_say_so() -> None:
    assert "several times" in options("train")["data"].help
    for name in ("generate", "chat"):
        found = options(name)
        assert "several times" in found["stop"].help and "several times" in found["logit_bias"].help
        assert found["logit_bias"].metavar == "TOKEN=BIAS"
        assert "None" not in found["logprobs"].help


def test_other_tools_spellings_are_taken_and_hidden() -> None:
    found = options("train")
    words = [
        w for w, name in SPELLINGS.items() if name in Recipe.model_fields and w not in Recipe.model_fields
    ]
    assert words and all(found[word].hidden for word in words)


def test_flags_override_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("family: fam\nmember: m\nsharing: sun\ndata: a.jsonl\nlr: 1.0e-3\nmax_steps: 7\n")
    recipe = recipe_of(
        Recipe, path, {"learning_rate": "0.5", "data": ["b.jsonl", "c.jsonl"]}, folder="family"
    )
    assert (recipe.learning_rate, recipe.max_steps) == (0.5, 7)
    assert (recipe.family, recipe.data) == ("fam", ("b.jsonl", "c.jsonl"))


def test_a_folder_and_flags_say_the_same_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "family: fam\nmember: m\nsharing: icarus\ndata: [a.jsonl]\ntuner: lora\nr: 4\nbf16: false\n"
    )
    flags = {
        "member": "m",
        "sharing": "icarus",
        "data": ["a.jsonl"],
        "tuner": "lora",
        "r": "4",
        "bf16": "false",
    }
    by_file = recipe_of(Recipe, path, {}, folder="family")
    assert recipe_of(Recipe, Path("fam"), flags, folder="family") == by_file


def test_a_recipe_file_that_is_missing_or_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="gone.yaml cannot be read: No such file"):
        recipe_of(Recipe, tmp_path / "gone.yaml", {}, folder="family")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(Refused, match="list.yaml is no recipe"):
        recipe_of(Recipe, tmp_path / "list.yaml", {}, folder="family")
