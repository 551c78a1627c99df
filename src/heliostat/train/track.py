"""Where a run's metrics go beside its log: TensorBoard, Weights & Biases or trackio, if asked for and installed.

A tracker is a guest: what goes wrong with it is said once, and the run goes on without it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from heliostat.errors import Refused
from heliostat.train.loop import Watch, due
from heliostat.train.recipe import Pace

PROJECT = "heliostat"
Tell = Callable[[str], None]


class Tracker(Protocol):
    """Somebody who keeps numbers by step."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class TensorBoard:
    """Event files in the run's own folder; what a killed run wrote after its last checkpoint is hidden."""

    folder: Path
    writer: Any = None

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        if self.writer is None:
            board = importlib.import_module("torch.utils.tensorboard")
            self.writer = board.SummaryWriter(str(self.folder / "tensorboard"), purge_step=step)
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Online:
    """wandb and trackio: modules with init, log and finish of the same meaning."""

    def __init__(self, module: str, *, name: str, config: Mapping[str, Any], **options: Any) -> None:
        self.module = importlib.import_module(module)
        self.module.init(project=PROJECT, name=name, config=dict(config), **options)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.module.log(dict(numbers), step=step)

    def close(self) -> None:
        self.module.finish()


def check_tracker(name: str) -> None:
    """Refuse a tracker whose package is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise Refused(
            f"report_to is {name!r}, and its package is not installed: pip install 'heliostat[{name}]', "
            "or say --report-to none"
        )


@contextmanager
def tracking(recipe: Pace, watch: Watch, folder: Path, name: str, *, tell: Tell) -> Iterator[Watch]:
    """``watch``, and beside it the tracker that the recipe asks for."""
    if recipe.report_to == "none":
        yield watch
        return
    guest = Guest(watch, recipe.logging_steps, recipe.report_to, tell)
    guest.begin(lambda: make_tracker(recipe, folder, name))
    try:
        yield guest
    finally:
        guest.end()


def make_tracker(recipe: Pace, folder: Path, name: str) -> Tracker:
    """The tracker of a recipe, at work."""
    config = recipe.model_dump(mode="json")
    if recipe.report_to == "tensorboard":
        return TensorBoard(folder)
    if recipe.report_to == "wandb":
        return Online("wandb", name=name, config=config, dir=str(folder))
    return Online("trackio", name=name, config=config)


class Guest:
    """Watches beside somebody else and tells a tracker what the log is told."""

    def __init__(self, watch: Watch, every: int, name: str, tell: Tell) -> None:
        self.watch, self.every, self.name, self.tell = watch, every, name, tell
        self.tracker: Tracker | None = None

    def step(self, record: Mapping[str, Any]) -> None:
        """See one step."""
        self.watch.step(record)
        if due(record["step"], self.every) or any(key.startswith("eval_") for key in record):
            numbers = {_place(key): value for key, value in record.items() if key != "step"}
            self._try(lambda tracker: tracker.log(numbers, record["step"]))

    def begin(self, make: Callable[[], Tracker]) -> None:
        """Let the tracker in."""
        try:
            self.tracker = make()
        except Exception as error:
            self._lose(error)

    def end(self) -> None:
        """Let it finish."""
        self._try(lambda tracker: tracker.close())

    def _try(self, act: Callable[[Tracker], None]) -> None:
        if self.tracker is None:
            return
        try:
            act(self.tracker)
        except Exception as error:  # whatever it is: hours of training are not lost for a picture of them
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.tracker = None
        self.tell(f"{self.name} failed ({error!r}): the run goes on without it, log.jsonl has everything")


def _place(key: str) -> str:
    """``eval_loss`` -> ``eval/loss``: where trackers group what belongs together."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
