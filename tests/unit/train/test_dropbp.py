"""Dropping in a run: rates by sensitivity, written and drawn; resume, accumulation, what is left behind, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.build import read_family
from heliostat.errors import Refused
from heliostat.family import SHARINGS
from heliostat.train import checkpoint
from heliostat.train.dropbp import PICTURE, RATES, branches_of
from heliostat.train.job import objective_of, prepare
from heliostat.train.loop import Run, make_optimizer, take_step
from heliostat.train.recipe import Recipe
from heliostat.train.settings import settings_of
from heliostat.train.tune import Outcome

Tune = Callable[..., Outcome]


def recipe(folder: Path, data: Path, **options: Any) -> Recipe:
    facts = {"family": str(folder), "member": "m", "sharing": "independent", "data": str(data)}
    return Recipe(
        **{**facts, "max_length": 128, "bf16": False, "max_steps": 12, "learning_rate": 0.02, **options}
    )


def curve(outcome: Outcome) -> list[float]:
    return [record["loss"] for record in outcome.history]


@pytest.mark.parametrize(("sharing", "tuner"), [("sun", "full"), ("icarus", "lora"), ("independent", "paca")])
def test_rate_zero_is_no_dropping_to_the_bit(
    bare_family: Path, tiny_data: Path, tune_member: Tune, sharing: str, tuner: str
) -> None:
    how = {"tuner": tuner, "max_steps": 4, "logging_steps": 1}
    plain = tune_member(bare_family, "plain", sharing, tiny_data, **how)
    zero = tune_member(bare_family, "zero", sharing, tiny_data, dropbp=0.0, dropbp_rates="uniform", **how)
    assert curve(plain) == curve(zero)
    digests = [read_family(bare_family).module(f"{name}.own").digest for name in ("plain", "zero")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("sharing", list(SHARINGS))
def test_every_sharing_learns_with_half_of_its_branches_dropped(
    bare_family: Path, tiny_data: Path, tune_member: Tune, sharing: str
) -> None:
    base = read_family(bare_family).module("base").digest
    said: list[str] = []
    outcome = tune_member(bare_family, "m", sharing, tiny_data, max_steps=12, dropbp=0.5, logging_steps=1)
    assert curve(outcome)[-1] < curve(outcome)[0]
    assert read_family(bare_family).module("base").digest == base  # the frozen half is what it was
    facts = json.loads((outcome.run_folder / RATES).read_text())
    assert facts["dropped"] == pytest.approx(0.5, abs=0.011)
    assert set(facts["rates"]) == {f"{n}.{kind}" for n in range(2) for kind in ("attention", "mlp")}
    assert (outcome.run_folder / PICTURE).read_text().startswith("<svg") and not said


def test_the_rates_are_said(bare_family: Path, tiny_data: Path) -> None:
    said: list[str] = []
    job = prepare(recipe(bare_family, tiny_data, dropbp=0.5))
    job.run_folder.mkdir(parents=True)
    objective = objective_of(job, tell=said.append)
    for step in range(3):
        objective.micros(step)
    assert len(said) == 1 and said[0].startswith("dropbp 0.5: rates by sensitivity") and PICTURE in said[0]


def test_an_interrupted_run_goes_on_to_the_same_end(bare_family: Path, tiny_data: Path) -> None:
    def run(member: str, stop: int | None) -> tuple[list[float], dict[str, torch.Tensor]]:
        job = prepare(recipe(bare_family, tiny_data, member=member, dropbp=0.5, save_steps=1))
        settings = settings_of(job.recipe, steps=job.steps, warmup=0)

        class Stopping:
            def step(self, record: Any) -> None:
                if record["step"] == stop:
                    raise KeyboardInterrupt

        one = Run(objective_of(job), job.parameters, settings, job.run_folder, "same", Stopping())
        if stop is None:
            history = one.fit().history
            return [r["loss"] for r in history], {n: p.detach().clone() for n, p in job.parameters.items()}
        with pytest.raises(KeyboardInterrupt):
            one.fit()
        return [], {}

    straight = run("straight", None)
    run("broken", 6)
    assert len(checkpoint.checkpoints(bare_family / "runs" / "broken")) > 0
    again = run("broken", None)
    assert again[0][-1] == straight[0][-1]
    assert all(torch.equal(p, again[1][name]) for name, p in straight[1].items())


def test_a_run_whose_rates_are_lost_says_so(bare_family: Path, tiny_data: Path) -> None:
    job = prepare(recipe(bare_family, tiny_data, dropbp=0.5))
    with pytest.raises(Refused, match=r"dropbp.json is missing.*--resume-from-checkpoint false"):
        objective_of(job).micros(7)
    job.run_folder.mkdir(parents=True)
    (job.run_folder / RATES).write_text('{"rates": {}}')
    with pytest.raises(Refused, match="damaged"):
        objective_of(job).micros(7)


def test_measuring_leaves_no_gradient_and_no_trace(bare_family: Path, tiny_data: Path) -> None:
    job = prepare(recipe(bare_family, tiny_data, dropbp=0.5))
    job.run_folder.mkdir(parents=True)
    before = {n: p.detach().clone() for n, p in job.parameters.items()}
    chance = torch.get_rng_state()
    objective = objective_of(job)
    objective.micros(1)
    assert objective.learner is not None and objective.learner.dropping.measured
    assert all(p.grad is None for p in job.parameters.values())
    assert all(torch.equal(p, before[n]) for n, p in job.parameters.items())
    assert torch.equal(torch.get_rng_state(), chance)


def test_micro_batches_of_a_step_share_its_draw(bare_family: Path, tiny_data: Path) -> None:
    options = {"dropbp": 0.5, "dropbp_rates": "uniform"}
    whole = prepare(recipe(bare_family, tiny_data, per_device_train_batch_size=8, **options))
    parts = prepare(
        recipe(
            bare_family, tiny_data, per_device_train_batch_size=4, gradient_accumulation_steps=2, **options
        )
    )
    tapes = {micro.modules[parts.own].tape for micro in objective_of(parts).micros(3)}
    assert tapes == {objective_of(whole).micros(3)[0].modules[whole.own].tape}


def test_a_parameter_without_gradient_is_left_alone(bare_family: Path, tiny_data: Path) -> None:
    job = prepare(recipe(bare_family, tiny_data, dropbp=0.75, dropbp_rates="uniform", weight_decay=0.1))
    objective, settings = objective_of(job), settings_of(job.recipe, steps=12, warmup=0)
    optimizer = make_optimizer(job.parameters, settings)
    before = {n: p.detach().clone() for n, p in job.parameters.items()}
    micros = objective.micros(0)
    tape = micros[0].modules[job.own].tape
    assert tape is not None
    take_step(micros, job.parameters, optimizer, 0, settings)
    for layer, on in enumerate(tape):
        for part, kept in (("self_attn", on.attention), ("mlp", on.mlp)):
            moved = [
                not torch.equal(p, before[n])
                for n, p in job.parameters.items()
                if f"layers.{layer}.{part}." in n
            ]
            assert moved and all(moved) == any(moved) == kept


@pytest.mark.parametrize("rate", ["-0.1", "0.96", "1", "nan"])
def test_other_rates_are_refused(bare_family: Path, tiny_data: Path, rate: str) -> None:
    from heliostat.train.spellings import make_recipe

    facts = {"family": str(bare_family), "member": "m", "sharing": "sun", "data": str(tiny_data)}
    with pytest.raises(Refused, match="dropbp"):
        make_recipe(Recipe, {**facts, "dropbp": rate})


def test_costs_are_computed_from_the_shape(bare_family: Path, tiny_data: Path) -> None:
    job = prepare(recipe(bare_family, tiny_data))
    config = job.modules[job.own].model.config
    both = branches_of(config, job.parameters, whole=True, writes_for_itself=True, context=0.0)
    frozen = branches_of(config, job.parameters, whole=False, writes_for_itself=True, context=0.0)
    sizes = {n: a * b for n, (a, b) in config.linears.items()}
    assert (
        both[1].flops
        == 2 * sum(sizes[n] for n in ("gate_proj", "up_proj", "down_proj"))
        == 2 * frozen[1].flops
    )
    assert both[0].flops == 2 * sum(sizes[n] for n in ("q_proj", "k_proj", "v_proj", "o_proj"))
    writer = branches_of(config, [], whole=True, writes_for_itself=False, context=10.0)
    scores = 4 * config.heads * config.head_width * 10.0
    assert writer[0].flops == 2 * (sizes["q_proj"] + sizes["o_proj"]) + scores and not writer[0].trained


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's compiler, looking at tensors
def test_blocks_compile_and_say_the_same(bare_family: Path, tiny_data: Path) -> None:
    job = prepare(recipe(bare_family, tiny_data, dropbp=0.5, dropbp_rates="uniform"))
    objective = objective_of(job)

    def gradients() -> dict[str, torch.Tensor]:
        (micro,) = objective.micros(2)
        micro.loss().backward()
        found = {n: p.grad.clone() for n, p in job.parameters.items() if p.grad is not None}
        for parameter in job.parameters.values():
            parameter.grad = None
        return found

    plain = gradients()
    for block in job.modules[job.own].model.blocks:
        block.compile(backend="aot_eager")
    compiled = gradients()
    assert set(plain) == set(compiled)
    for name, gradient in plain.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-6)
