"""Training state on disk: parameters, optimizer and history, whole or not at all, without pickle."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heliostat.errors import Refused
from heliostat.files import atomic_directory, atomic_write_text, read_json
from heliostat.model.weights import read_tensors, save_tensors
from heliostat.train.ranks import part_like, whole

NAME = re.compile(r"checkpoint-(\d{8})")
PARAMETERS, OPTIMIZER, STATE = "parameters.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: optimizer steps done, and one record for every logged step."""

    step: int = 0
    history: tuple[Mapping[str, Any], ...] = ()


def save(
    folder: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    identity: str,
    keep: int,
    writes: bool = True,
) -> Path:
    """Write ``checkpoint-<step>`` under ``folder`` atomically, then drop all but the newest ``keep``.

    ``parameters``: and whatever else moves; what the optimizer does not know has no moments.
    ``writes``: whether this process does; where tensors are parted among several, the others only give their parts.
    """
    target = Path(folder) / f"checkpoint-{progress.step:08}"
    trained = {n: whole(p.detach()) for n, p in parameters.items()}
    moments = _moments(parameters, optimizer)
    if not writes:
        return target
    if not (target / STATE).is_file():
        shutil.rmtree(target, ignore_errors=True)  # half of one, whose removal was cut short
        with atomic_directory(target) as partial:
            save_tensors(trained, partial / PARAMETERS)
            save_tensors(moments, partial / OPTIMIZER)
            state = {"step": progress.step, "identity": identity, "history": list(progress.history)}
            atomic_write_text(partial / STATE, json.dumps(state))
    for old in checkpoints(folder)[:-keep]:
        discard(old)
    return target


def discard(path: Path) -> None:
    """Remove one checkpoint: first its name as a whole one, so that half of it is never taken for a whole one."""
    (path / STATE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; a directory that was never finished does not count."""
    found = [p for p in Path(folder).glob("checkpoint-*") if NAME.fullmatch(p.name) and (p / STATE).is_file()]
    return sorted(found, key=lambda p: p.name)


def resume(
    folder: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, *, identity: str
) -> Progress:
    """Load the newest checkpoint into parameters and optimizer; a fresh Progress where there is none.

    A damaged one is passed over, with a warning, for the one before it, and removed: its name will be needed.
    Raises Refused where all are damaged, or belong to another recipe, data or base (``identity`` differs).
    """
    refuse_other(folder, identity=identity)
    damaged: list[tuple[Path, Refused]] = []
    for path in reversed(checkpoints(folder)):
        try:
            progress, _ = _read_state(path)
            saved, moments = (dict(read_tensors([path / name])) for name in (PARAMETERS, OPTIMIZER))
        except Refused as error:
            damaged.append((path, error))
            continue
        if set(saved) != set(parameters):
            raise Refused(
                f"{path} holds other parameters than this run trains; remove {folder} to start over"
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(part_like(saved[name], parameter))
        _restore(parameters, optimizer, moments)
        for broken, reason in damaged:
            warnings.warn(f"{reason}; going on from {path.name}", stacklevel=1)
            discard(broken)
        return progress
    if damaged:
        raise Refused(f"{damaged[0][1]}; no older checkpoint is whole: remove {folder} to start over")
    return Progress()


def refuse_other(folder: Path, *, identity: str, why: str = "") -> None:
    """Refuse where the newest readable checkpoint is another run's; ``why`` is what a caller knows about that."""
    for path in reversed(checkpoints(folder)):
        try:
            _, found = _read_state(path)
        except Refused:
            continue
        if found != identity:
            raise Refused(
                f"{path} belongs to another recipe, data or base{why}; to start over, remove {folder} "
                "or say --resume-from-checkpoint false"
            )
        return


def _read_state(path: Path) -> tuple[Progress, str]:
    """Where a checkpoint stands, and the identity of its run."""
    state = read_json(path / STATE)
    try:
        return Progress(int(state["step"]), tuple(state["history"])), str(state["identity"])
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"{path / STATE} is damaged: {error!r}") from error


def _moments(parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": value.detach().reshape(-1) if value.dim() == 0 else whole(value.detach())
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _restore(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]
) -> None:
    for name_and_key, value in saved.items():
        name, _, key = name_and_key.rpartition("|")
        # The fused AdamW wants its step count where the parameter is, too.
        restored = value.to(parameters[name].device)
        restored = restored.reshape(()) if key == "step" else part_like(restored, parameters[name])
        optimizer.state[parameters[name]][key] = restored.clone()
