"""Trackers are told what the log is told; one that is missing is named before the run, one that fails ends nothing."""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from heliostat.errors import Refused
from heliostat.train import track
from heliostat.train.pretrain_recipe import PretrainRecipe
from heliostat.train.recipe import Recipe
from heliostat.train.spellings import make_recipe
from heliostat.train.track import check_tracker
from heliostat.train.tune import Outcome, _identity, prepare, tune
from heliostat.train.watch import Bar, Silent

Tune = Callable[..., Outcome]
LOGGED = {"max_steps": 6, "logging_steps": 2, "eval_steps": 3}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A stand-in for wandb or trackio that writes down how it is called."""

    def make(name: str) -> ModuleType:
        module = ModuleType(name)
        module.calls = []  # type: ignore[attr-defined]
        for verb in ("init", "log", "finish"):
            setattr(module, verb, lambda *a, verb=verb, **k: module.calls.append((verb, a, k)))
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(track, "check_tracker", lambda name: None)
        monkeypatch.setattr("heliostat.train.job.check_tracker", lambda name: None)
        return module

    return make


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_told_what_the_log_is_told(
    bare_family: Path, tiny_data: Path, tune_member: Tune, fake: Callable[[str], Any], name: str
) -> None:
    module = fake(name)
    outcome = tune_member(
        bare_family, "m", "sun", tiny_data, report_to=name, eval_data=str(tiny_data), **LOGGED
    )
    (first, _, begun), *logged, (last, _, _) = module.calls
    assert (first, last) == ("init", "finish")
    assert begun["project"] == "heliostat" and begun["name"] == "m" and begun["config"]["sharing"] == "sun"
    steps = [options["step"] for _, _, options in logged]
    assert steps == [2, 3, 4, 6] == [record["step"] for record in outcome.history]
    for (_, (numbers,), _), record in zip(logged, outcome.history, strict=True):
        assert numbers["train/loss"] == record["loss"]
        assert numbers.get("eval/accuracy") == record.get("eval_accuracy")


def test_tensorboard_shows_the_curve(bare_family: Path, tiny_data: Path, tune_member: Tune) -> None:
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    outcome = tune_member(bare_family, "m", "sun", tiny_data, report_to="tensorboard", **LOGGED)
    shown = loading.EventAccumulator(str(outcome.run_folder / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in shown.Scalars("train/loss")]
    expected = [(r["step"], pytest.approx(r["loss"])) for r in outcome.history]
    assert found == expected and len(found) == 3


@pytest.mark.parametrize("verb", ["init", "log", "finish"])
def test_one_that_fails_ends_no_run_and_is_named_once(
    bare_family: Path, tiny_data: Path, fake: Callable[[str], Any], verb: str
) -> None:
    def fails(*words: Any, **options: Any) -> None:
        raise ConnectionError("nobody answers")

    setattr(fake("wandb"), verb, fails)
    told: list[str] = []
    asked = {"family": str(bare_family), "member": "m", "sharing": "sun", "data": str(tiny_data)}
    recipe = make_recipe(Recipe, {**asked, "max_length": 128, "report_to": "wandb", **LOGGED})
    outcome = tune(recipe, watching=lambda job: nullcontext(Silent()), echo=told.append)
    assert outcome.history[-1]["step"] == 6
    assert told == [
        "wandb failed (ConnectionError('nobody answers')): the run goes on without it, log.jsonl has everything"
    ]


def test_one_that_is_not_installed_is_refused_before_the_run(
    bare_family: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    asked = {"family": str(bare_family), "member": "m", "sharing": "sun", "data": str(tiny_data)}
    with pytest.raises(Refused, match=r"report_to is 'trackio'.*pip install 'heliostat\[trackio\]'"):
        prepare(make_recipe(Recipe, {**asked, "report_to": "trackio"}))
    check_tracker("none")
    for kind in (Recipe, PretrainRecipe):
        with pytest.raises(Refused, match=r"report_to is 'wandbb'.*did you mean 'wandb'"):
            make_recipe(kind, {**(asked if kind is Recipe else {"output_dir": "o"}), "report_to": "wandbb"})


def test_a_tracker_changes_no_curve(
    bare_family: Path, tiny_data: Path, tune_member: Tune, fake: Callable[[str], Any]
) -> None:
    fake("wandb")
    curves = []
    for member, options in (("one", {}), ("two", {"report_to": "wandb"})):
        outcome = tune_member(bare_family, member, "sun", tiny_data, max_steps=4, logging_steps=1, **options)
        log = (outcome.run_folder / "log.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in log])
    assert curves[0] == curves[1] and len(curves[0]) == 4


def test_the_last_evaluation_stays_in_sight() -> None:
    bar, shown = Bar(4, what="m"), []
    step = {"step": 1, "loss": 1.0, "tokens": 8, "seconds": 1.0}
    for extra in ({}, {"eval_loss": 0.5, "eval_accuracy": 0.25}, {}, {"eval_loss": 0.125}):
        bar.step({**step, **extra})
        shown.append(bar.progress.tasks[0].fields["facts"])
    assert "eval" not in shown[0]
    assert all("eval loss 0.5  eval accuracy 0.25" in line for line in shown[1:3])
    assert "eval loss 0.125" in shown[3] and "accuracy" not in shown[3]


def test_a_run_may_change_its_tracker_on_the_way(
    bare_family: Path, tiny_data: Path, fake: Callable[[str], Any]
) -> None:
    asked = {"family": str(bare_family), "member": "m", "sharing": "sun", "data": str(tiny_data)}
    plain = make_recipe(Recipe, {**asked, "max_length": 128, **LOGGED})
    fake("trackio")
    changed = plain.model_copy(update={"report_to": "trackio", "eval_samples": 3, "device": "cpu"})
    first, second = (_identity(prepare(r)) for r in (plain, changed))
    assert first == second != _identity(prepare(plain.model_copy(update={"seed": 1})))
