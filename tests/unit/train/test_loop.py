"""The training loop: schedules, accumulation, clipping, log, interruption; checkpoints whole or not at all."""

import json
import math
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heliostat.errors import Refused
from heliostat.train import checkpoint
from heliostat.train.loop import Interrupted, Run, Settings, make_optimizer, rate_share, take_step


def settings(**options: Any) -> Settings:
    return Settings(**{"steps": 10, "learning_rate": 0.1, "logging_steps": 1, **options})


@dataclass
class Rows:
    """Some rows of a regression, as a micro-batch."""

    model: nn.Linear
    x: Tensor
    bad: float = 0.0

    @property
    def spoken(self) -> int:
        return len(self.x)

    tokens = 7

    def loss(self) -> Tensor:
        return (
            self.model(self.x).squeeze(-1) - self.x.sum(-1)
        ).square().sum() + self.bad * self.model.weight.sum()


@dataclass
class Regression:
    """Seeded rows, in micro-batches of any sizes."""

    model: nn.Linear
    sizes: Sequence[int] = (4, 4)
    bad: Mapping[int, float] | None = None
    before: Callable[[int], None] = lambda step: None

    def micros(self, step: int) -> list[Rows]:
        self.before(step)
        x = torch.randn(sum(self.sizes), 3, generator=torch.Generator().manual_seed(step))
        parts = x.split(list(self.sizes))
        return [Rows(self.model, part, (self.bad or {}).get(step, 0.0)) for part in parts]


class Watched:
    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []

    def step(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)


def fresh() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def make(folder: Path, objective: Regression | None = None, *, identity: str = "i", **options: Any) -> Run:
    objective = objective or Regression(fresh())
    parameters = dict(objective.model.named_parameters())
    return Run(objective, parameters, settings(**options), folder, identity, Watched())


def curve(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history]


# Schedules


def shares(**options: Any) -> list[float]:
    found = settings(**options)
    return [rate_share(step, found) for step in range(found.steps)]


def test_schedules_rise_and_fall_as_they_should() -> None:
    linear = shares(steps=12, warmup_steps=2, lr_scheduler_type="linear")
    assert linear == pytest.approx([1 / 3, 2 / 3, *(1 - i / 10 for i in range(10))])
    cosine = shares(steps=10, lr_scheduler_type="cosine")
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)])
    stable = shares(steps=10, lr_scheduler_type="warmup_stable_decay", decay_share=0.4)
    assert stable == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])
    assert shares(steps=5, warmup_steps=1, lr_scheduler_type="constant") == pytest.approx([0.5, 1, 1, 1, 1])


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "warmup_stable_decay"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (5, 5), (7, 9), (100, 3)])
def test_a_rate_is_a_share_and_no_step_is_wasted(kind: str, steps: int, warmup: int) -> None:
    found = shares(steps=steps, warmup_steps=warmup, lr_scheduler_type=kind)
    assert all(0 < share <= 1 for share in found)


# One step


def test_accumulated_micro_batches_are_one_big_batch() -> None:
    models = {}
    for sizes in ((8,), (4, 4), (1, 5, 2)):  # of unequal sizes too: the mean is over tokens, not over batches
        model = fresh()
        optimizer = make_optimizer(dict(model.named_parameters()), settings(weight_decay=0.1))
        records = [
            take_step(
                Regression(model, sizes).micros(step),
                dict(model.named_parameters()),
                optimizer,
                step,
                settings(),
            )
            for step in range(4)
        ]
        models[sizes] = (model.weight.detach().clone(), [r["loss"] for r in records])
    for weight, losses in models.values():
        torch.testing.assert_close(weight, models[8,][0])
        assert losses == pytest.approx(models[8,][1])


def test_gradients_are_clipped_and_their_length_is_told() -> None:
    for limit in (0.01, 0.0):
        model = fresh()
        before, parameters = model.weight.detach().clone(), dict(model.named_parameters())
        optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
        record = take_step(
            Regression(model).micros(0),
            parameters,
            optimizer,
            0,
            settings(learning_rate=1.0, max_grad_norm=limit),
        )
        assert record["grad_norm"] > 0.5  # as it was
        moved = float((model.weight.detach() - before).norm())
        assert moved <= 0.0101 if limit else moved > 0.1


def test_decay_is_for_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    groups = make_optimizer(dict(model.named_parameters()), settings(weight_decay=0.1)).param_groups
    assert [[p.dim() for p in g["params"]] for g in groups] == [[2], [1, 1, 1]]
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]


def test_a_loss_that_explodes_is_reported_before_it_is_learned(tmp_path: Path) -> None:
    for bad in (math.inf, math.nan):
        objective = Regression(fresh(), bad={3: bad})
        run = make(tmp_path / str(bad), objective, save_steps=1)
        with pytest.raises(Refused, match="step 4"):
            run.fit()
        assert all(p.isfinite().all() for p in objective.model.parameters())
        assert checkpoint.checkpoints(run.folder)[-1].name == "checkpoint-00000003"


def test_gradients_that_explode_are_reported_before_they_are_learned() -> None:
    model, parameters = fresh(), {}
    parameters = dict(model.named_parameters())

    class Steep(Rows):
        def loss(self) -> Tensor:
            return self.model.weight.sum().square().sqrt() * 0 + (self.model.weight * 0).sum().sqrt()

    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = make_optimizer(parameters, settings())
    with pytest.raises(Refused, match="gradient"):
        take_step([Steep(model, torch.ones(2, 3))], parameters, optimizer, 0, settings())
    assert model.weight.isfinite().all()


# A run


def test_a_run_learns_logs_and_keeps_the_newest_checkpoints(tmp_path: Path) -> None:
    run = make(tmp_path, steps=30, save_steps=10, save_total_limit=2, logging_steps=7)
    progress = run.fit()
    steps = [record["step"] for record in progress.history]
    assert steps == [7, 14, 21, 28, 30]
    assert progress.history[-1]["loss"] < progress.history[0]["loss"]
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == steps
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-00000020",
        "checkpoint-00000030",
    ]
    assert len(run.watch.records) == 30  # type: ignore[attr-defined]


def test_evaluation_comes_when_due_and_at_the_end(tmp_path: Path) -> None:
    run = make(tmp_path, steps=10, eval_steps=4, logging_steps=100)
    run.evaluate = lambda: {"loss": 1.5}
    assert [(r["step"], r["eval_loss"]) for r in run.fit().history] == [(4, 1.5), (8, 1.5), (10, 1.5)]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_goes_on_as_if_it_had_not_been(signum: int, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", steps=12)
    want = whole.fit()
    objective = Regression(fresh(), before=lambda step: os.kill(os.getpid(), signum) if step == 4 else None)
    run = make(tmp_path / "cut", objective, steps=12)
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match="after step 5 of 12"):
        run.fit()
    assert signal.getsignal(signum) is before
    again = make(tmp_path / "cut", steps=12)
    got = again.fit()
    assert curve(got.history) == curve(want.history)
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, again.parameters[name]), name


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def twice(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Regression(fresh(), before=twice)).fit()


def test_beginning_anew_forgets_what_was_there(tmp_path: Path) -> None:
    make(tmp_path, steps=10, save_steps=5, identity="old").fit()
    run = make(tmp_path, steps=6, save_steps=3, identity="new")
    assert run.fit(resume=False).step == 6
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == [
        "checkpoint-00000003",
        "checkpoint-00000006",
    ]
    assert (
        make(tmp_path, steps=6, identity="new").fit().step == 6
    )  # and it is the new one that is gone on from


def test_another_recipe_does_not_go_on_from_this_one(tmp_path: Path) -> None:
    make(tmp_path, steps=3, identity="one").fit()
    with pytest.raises(Refused, match="another recipe"):
        make(tmp_path, steps=3, identity="two").fit()


# Checkpoints


def saved(folder: Path, steps: int = 3) -> Run:
    run = make(folder, steps=steps, save_steps=1, save_total_limit=3)
    run.fit()
    return run


def resume(folder: Path, **options: Any) -> checkpoint.Progress:
    model = fresh()
    parameters = dict(model.named_parameters())
    return checkpoint.resume(
        folder, parameters, make_optimizer(parameters, settings()), **{"identity": "i", **options}
    )


def test_a_checkpoint_holds_everything_to_the_bit(tmp_path: Path) -> None:
    run = saved(tmp_path)
    model = fresh()
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(parameters, settings())
    progress = checkpoint.resume(tmp_path, parameters, optimizer, identity="i")
    assert progress.step == 3 and len(progress.history) == 3
    assert all(torch.equal(p, run.parameters[n]) for n, p in parameters.items())
    state = optimizer.state[parameters["weight"]]
    assert (
        set(state) == {"step", "exp_avg", "exp_avg_sq"}
        and float(state["step"]) == 3
        and state["step"].dim() == 0
    )


def test_what_was_never_finished_is_not_loaded(tmp_path: Path) -> None:
    saved(tmp_path)
    newest = checkpoint.checkpoints(tmp_path)[-1]
    (newest / checkpoint.STATE).unlink()  # as `discard` begins
    assert resume(tmp_path).step == 2
    (tmp_path / "checkpoint-00000009.partial-1-1").mkdir()
    (tmp_path / "checkpoint-9").mkdir()
    assert resume(tmp_path).step == 2
    assert resume(tmp_path / "nowhere").step == 0
    assert saved(tmp_path).settings.steps == 3  # and its name can be used again
    assert resume(tmp_path).step == 3


@pytest.mark.parametrize("name", [checkpoint.PARAMETERS, checkpoint.OPTIMIZER, checkpoint.STATE])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    for path in checkpoint.checkpoints(tmp_path)[1:]:
        (path / name).write_bytes((path / name).read_bytes()[:-9])
    with pytest.warns(UserWarning, match=rf"{name}.*damaged.*going on from checkpoint-00000001"):
        assert resume(tmp_path).step == 1
    again = saved(tmp_path)  # the names of the damaged ones are free
    want = saved(tmp_path / "undamaged")
    assert all(torch.equal(p, want.parameters[n]) for n, p in again.parameters.items())
    assert resume(tmp_path).step == 3


@pytest.mark.parametrize("name", [checkpoint.PARAMETERS, checkpoint.OPTIMIZER, checkpoint.STATE])
def test_where_every_checkpoint_is_damaged_nothing_is_removed(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    for path in checkpoint.checkpoints(tmp_path):
        (path / name).write_bytes(b"{}" if name == checkpoint.STATE else b"")
    with pytest.raises(Refused, match=rf"00003/{name}.*damaged.*no older checkpoint is whole"):
        resume(tmp_path)
    assert len(checkpoint.checkpoints(tmp_path)) == 3


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    parameters = {"other": nn.Parameter(torch.zeros(2))}
    with pytest.raises(Refused, match="other parameters"):
        checkpoint.resume(tmp_path, parameters, make_optimizer(parameters, settings()), identity="i")


def test_a_full_disk_loses_nothing_that_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Mapping[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    run = make(tmp_path, steps=6, save_steps=2)
    run.objective = Regression(
        run.objective.model,  # type: ignore[attr-defined]
        before=lambda step: monkeypatch.setattr(checkpoint, "save_tensors", full) if step == 3 else None,
    )
    with pytest.raises(Refused, match="disk full"):
        run.fit()
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["checkpoint-00000002"]
    assert make(tmp_path, steps=6, save_steps=2).fit().step == 6
