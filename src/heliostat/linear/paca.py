"""PaCA (arXiv 2503.01905) on a model: columns put on, written into the weights, lifted, merged, saved and loaded.

For heliostat's own transformer and for models of transformers alike::

    paca.apply(model, r=64)        # everything is frozen but r columns of every Linear
    ...                            # any trainer, any torch optimizer
    paca.save(model, folder)       # as LoRA in PEFT's format, without loss
    paca.merge(model)              # or: the plain model, the columns in its weights
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heliostat.errors import Refused
from heliostat.linear.adapter import linear_at, read_adapter, save_as_lora, save_columns
from heliostat.linear.choice import Choice, add_columns, inner_of, put_columns
from heliostat.linear.columns import Columns
from heliostat.linear.lora import AdaptedLinear, adapted_at, adapted_linears

Form = Literal["resident", "delta"]
DEFAULT = "default"


def apply(
    model: nn.Module,
    *,
    r: int,
    targets: str | Iterable[str] = "all-linear",
    name: str = DEFAULT,
    choice: Choice = "random",
    seed: int = 0,
    form: Form = "resident",
    loss: Callable[[], Tensor] | None = None,
) -> list[str]:
    """Freeze the model and let it wear fresh columns called ``name``; returns the full names of its tuned Linears.

    ``targets``: last names of Linears, or all-linear: all but the output head. ``form``: resident writes the columns
    into the weights (fastest; nothing else can run on them meanwhile), delta leaves the weights alone. ``loss``: of a
    first batch, for the choice "gradient". Raises Refused for what the model has not, and for tied weights.
    """
    names = _targets(model, targets)
    _refuse_tied(model, [p for p, m in _linears(model) if p.rsplit(".", 1)[-1] in names])
    model.requires_grad_(False)
    paths = add_columns(model, name, r=r, targets=names, choice=choice, seed=seed, loss=loss)
    _begin(model, name, form)
    return paths


def columns_of(model: nn.Module, name: str = DEFAULT) -> dict[str, Columns]:
    """The parts called ``name`` by the path of their Linear, sorted."""
    return {
        path: part
        for path, module in adapted_linears(model, name).items()
        if isinstance(part := module.part(name), Columns)
    }


def wear(model: nn.Module, name: str | None, *, form: Form = "resident") -> None:
    """From now on the model, called as its library calls it, is the one tuned as ``name``; None: the base, bit by bit."""
    for module in adapted_linears(model).values():
        own = module.part(name)
        for part in module.adapters.values():
            if isinstance(part, Columns) and not (part is own and form == "resident"):
                part.lift(module.inner)
        module.worn = name
    if name is not None and form == "resident":
        settle(model, name)


def settle(model: nn.Module, name: str = DEFAULT) -> None:
    """Write the columns into the weights, where each stays until it is lifted; nothing else can run there meanwhile."""
    for path, part in columns_of(model, name).items():
        part.settle(adapted_at(model, path).inner)


def lift(model: nn.Module, name: str = DEFAULT) -> None:
    """Back to the delta form: the weights are again what they were, bit by bit."""
    for path, part in columns_of(model, name).items():
        part.lift(adapted_at(model, path).inner)


def refresh(model: nn.Module) -> None:
    """Write all resident columns anew. Only who writes to ``parameter.data`` must call this: that leaves no trace."""
    for module in adapted_linears(model).values():
        for part in module.adapters.values():
            if isinstance(part, Columns):
                part.refresh(module.inner, unseen=True)


def merge(model: nn.Module) -> nn.Module:
    """The plain model again, with the columns that it wears in its weights for good; all adapters are off."""
    for path, module in adapted_linears(model).items():
        part = module.part(module.worn)
        if part is not None and not isinstance(part, Columns):
            raise Refused(f"{path} wears a low-rank adapter, not columns: paca cannot merge it")
        wear(module, module.worn)  # nobody else's columns, and its own as they are now
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.inner)
    return model


def save(model: nn.Module, folder: str | Path, *, name: str = DEFAULT, small: bool = False) -> None:
    """Write the tuned columns as a LoRA in PEFT's format, without loss.

    ``small``: as PEFT's PaCA, which PEFT reads from 0.22 on, without the matrices that select columns.
    """
    parts = columns_of(model, name)
    if not parts:
        raise Refused(f"nothing to save: this model has no columns called {name!r}")
    columns = {path: (part.delta, part.columns) for path, part in parts.items()}
    base = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    if small:
        return save_columns(Path(folder), columns, base=base)
    inputs = {path: inner_of(model, path).in_features for path in parts}
    save_as_lora(Path(folder), columns, inputs, base=base)


def load(model: nn.Module, folder: str | Path, *, name: str = DEFAULT, form: Form = "resident") -> list[str]:
    """Freeze the model and let it wear saved columns, ours or PEFT's; returns the full names of its tuned Linears.

    They can be trained on. Raises Refused where the folder's adapter is no selection of columns, or does not fit.
    """
    saved = read_adapter(Path(folder))
    chosen = {path: part.columns for path, part in saved.items() if part.columns is not None}
    if other := sorted(set(saved) - set(chosen)):
        raise Refused(f"{folder}: the adapter on {other[0]} is low-rank, no selection of columns")
    for path, part in saved.items():
        part.refuse_other_shape(Path(folder), path, linear_at(model, path, Path(folder)))
    _refuse_tied(model, sorted(chosen))
    model.requires_grad_(False)
    for path, placed in put_columns(model, name, chosen).items():
        placed.delta.data = (saved[path].b.float() * saved[path].scale).to(placed.delta.device)
    _begin(model, name, form)
    return sorted(chosen)


def _begin(model: nn.Module, name: str, form: Form) -> None:
    wear(model, name, form=form)
    model.register_forward_pre_hook(_before)


def _targets(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Last names of Linears; those that the model has not are refused with what there is."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    there = {path.rsplit(".", 1)[-1]: module is head for path, module in _linears(model)}
    if isinstance(targets, str):
        every = sorted(name for name, is_head in there.items() if not is_head)
        targets = every if targets == "all-linear" else [t.strip() for t in targets.split(",")]
    names = list(targets)
    if unknown := sorted(set(names) - set(there)):
        raise Refused(
            f"targets {', '.join(unknown)}: this model has {', '.join(sorted(there)) or 'no Linear'}"
        )
    return names


def _linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every Linear that can be tuned, with its path; one that has adapters already stands for the one inside it."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, AdaptedLinear)) and not path.endswith(".inner")
    ]


def _refuse_tied(model: nn.Module, paths: Sequence[str]) -> None:
    """Columns of a weight that two modules hold would be tuned in both."""
    holders: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(parameter.data_ptr(), []).append(path)
    for path in paths:
        module = model.get_submodule(path)
        assert isinstance(module, nn.Linear | AdaptedLinear), path
        shared = holders[module.weight.data_ptr()]
        if len(shared) > 1:
            raise Refused(
                f"{path} is tied: its weight is also {', '.join(n for n in shared if path not in n)}"
            )


@torch.compiler.disable
def _before(model: nn.Module, args: Any) -> None:
    """Before the whole model runs: a compiled one does not look at its columns by itself."""
    refresh(model)
