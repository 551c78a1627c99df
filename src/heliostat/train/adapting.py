"""What a run puts on the base where its member is an adapter: low-rank matrices, or columns that are tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from heliostat.build import Loaded
from heliostat.errors import Refused
from heliostat.linear.adapter import save_adapter, save_columns
from heliostat.linear.choice import add_columns, put_columns
from heliostat.linear.lora import add_adapter, parts_of
from heliostat.linear.paca import columns_of, settle
from heliostat.model.weights import read_tensors, save_tensors
from heliostat.train.checkpoint import checkpoints
from heliostat.train.ranks import Ranks
from heliostat.train.recipe import Settled

CHOSEN = "columns.safetensors"
"""In a run's folder: which columns are tuned, so that a run that goes on tunes the same ones."""

Modules = dict[str, Loaded]


def adapt(
    loaded: Modules,
    recipe: Settled,
    own: str,
    *,
    resident: bool,
    first_loss: Callable[[Mapping[str, Loaded]], Tensor],
    known: Mapping[str, Tensor] | None,
    ranks: Ranks,
) -> tuple[Modules, dict[str, nn.Parameter]]:
    """The loaded modules and the member's own, a fresh adapter on its seat; and what of it is trained.

    ``resident``: nothing else runs on that, so columns may stand in its weights. ``first_loss``: of the first batch
    under given modules. ``known``: columns that were chosen before, by path. Of several processes the first one's choice
    is everybody's: a sum that is rounded otherwise elsewhere could choose others.
    """
    model = loaded[recipe.seat].model
    modules = {**loaded, own: Loaded(own, "", recipe.seat, model, own)}
    assert recipe.r is not None and recipe.target_modules is not None
    if recipe.tuner == "lora":
        assert recipe.lora_alpha is not None
        add_adapter(model, own, r=recipe.r, alpha=recipe.lora_alpha, targets=recipe.target_modules)
    elif known is not None:
        put_columns(model, own, known)
    else:
        assert recipe.columns is not None
        add_columns(
            model,
            own,
            r=recipe.r,
            targets=recipe.target_modules,
            choice=recipe.columns,
            seed=recipe.seed,
            loss=lambda: first_loss(modules),
        )
        ranks.as_first(part.columns for part in columns_of(model, own).values())
    if recipe.tuner == "paca" and resident:
        settle(model, own)
        del modules[recipe.seat]  # it is not there any more
    parts = parts_of(model, own)
    return modules, {f"{path}.{n}": p for path, part in parts.items() for n, p in part.named_parameters()}


def save_own(target: Path, loaded: Loaded, recipe: Settled) -> None:
    """Write the member's adapter as it is saved in a family."""
    model, name = loaded.model, loaded.name
    if recipe.tuner == "paca":
        columns = {path: (part.delta, part.columns) for path, part in columns_of(model, name).items()}
        return save_columns(target, columns, base=recipe.seat)
    assert recipe.r is not None and recipe.lora_alpha is not None
    return save_adapter(target, model, name, r=recipe.r, alpha=recipe.lora_alpha, base=recipe.seat)


def keep_columns(run_folder: Path, loaded: Loaded) -> None:
    """Write down which columns are tuned, for a run that may have to go on."""
    if parts := columns_of(loaded.model, loaded.name):
        save_tensors({path: part.columns for path, part in parts.items()}, run_folder / CHOSEN)


def kept_columns(run_folder: Path, recipe: Settled) -> dict[str, Tensor] | None:
    """The columns of a run that goes on; None where it begins."""
    begins = recipe.resume_from_checkpoint is False or not checkpoints(run_folder)
    if recipe.tuner != "paca" or begins:
        return None
    if not (run_folder / CHOSEN).is_file():
        raise Refused(
            f"{run_folder / CHOSEN} is missing: it says which columns this run tunes; start over with "
            "--resume-from-checkpoint false"
        )
    return dict(read_tensors([run_folder / CHOSEN]))
