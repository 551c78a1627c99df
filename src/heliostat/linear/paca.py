"""PaCA (arXiv 2503.01905): which columns of which Linears are tuned, put on, written in, lifted, merged.

For heliostat's own transformer and for models of transformers alike::

    paca.apply(model, r=64)        # everything is frozen but r columns of every Linear
    ...                            # any trainer, any torch optimizer
    paca.save(model, folder)       # as LoRA in PEFT's format, without loss
    paca.merge(model)              # or: the plain model, the columns in its weights
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heliostat.errors import Refused
from heliostat.linear.columns import Columns, Gather, is_dense
from heliostat.linear.lora import AdaptedLinear, adapted_at, adapted_linears, put_part

Choice = Literal["random", "norm", "gradient"]
"""How columns are chosen: by chance, the longest ones, or those on which the first batch pulls most."""
Form = Literal["resident", "delta"]
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that read one input: they tune the same columns, so that those are gathered once."""
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
    model.requires_grad_(False)
    paths = add_columns(model, name, r=r, targets=names, choice=choice, seed=seed, loss=loss)
    _refuse_tied(model, paths)
    wear(model, name, form=form)
    model.register_forward_pre_hook(_before)
    return paths


def add_columns(
    model: nn.Module,
    name: str,
    *,
    r: int,
    targets: Iterable[str],
    choice: Choice = "random",
    seed: int = 0,
    loss: Callable[[], Tensor] | None = None,
) -> list[str]:
    """Put fresh columns, in delta form, on every Linear whose last name is in ``targets``; returns their full names.

    ``loss`` of a first batch, through the very adapter called ``name``, is needed for the choice "gradient" only.
    """
    groups = _groups(model, set(targets))
    for paths in groups:
        inputs = _inputs(model, paths)
        if not 1 <= r <= inputs:
            raise Refused(f"r is {r}: {paths[0]} has {inputs} inputs, so it must be from 1 to {inputs}")
    scores = _scores(model, name, groups, choice, loss)
    for paths in groups:
        inputs = _inputs(model, paths)
        picked = _drawn(inputs, r, seed, paths[0]) if choice == "random" else _best(scores[paths[0]], r)
        _put(model, name, paths, picked)
    return sorted(path for paths in groups for path in paths)


def put_columns(model: nn.Module, name: str, columns: Mapping[str, Tensor]) -> dict[str, Columns]:
    """Put on columns that are known already, by path; Linears of one input and equal columns gather them once."""
    groups: dict[tuple[str, bytes], list[str]] = {}
    for path, chosen in columns.items():
        key = (_group(path), chosen.cpu().numpy().tobytes())
        groups.setdefault(key, []).append(path)
    return {
        path: part
        for paths in groups.values()
        for path, part in _put(model, name, paths, columns[paths[0]]).items()
    }


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
        for key in module.adapters:
            if isinstance(part := module.part(key), Columns) and not (key == name and form == "resident"):
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
    """Write resident columns anew where they have changed. Only who writes to ``parameter.data`` must call this."""
    for module in adapted_linears(model).values():
        for part in module.adapters.values():
            if isinstance(part, Columns):
                part.refresh(module.inner)


def merge(model: nn.Module, name: str | None = None) -> nn.Module:
    """The plain model again, with the columns called ``name`` (None: those it wears) in its weights for good."""
    for path, module in adapted_linears(model).items():
        own = module.worn if name is None else name
        wear(module, None)
        if isinstance(part := module.part(own), Columns):
            part.settle(module.inner)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.inner)
    return model


# --- which columns --------------------------------------------------------------------------------------------


def _targets(model: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Last names of Linears; those that the model has not are refused with what there is."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    there = {
        path.rsplit(".", 1)[-1]
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, AdaptedLinear)) and module is not head and not path.endswith(".inner")
    }
    if isinstance(targets, str):
        targets = sorted(there) if targets == "all-linear" else [t.strip() for t in targets.split(",")]
    names = list(targets)
    if unknown := sorted(set(names) - there):
        raise Refused(f"targets {', '.join(unknown)}: this model has {', '.join(sorted(there)) or 'no Linear'}")
    return names


def _refuse_tied(model: nn.Module, paths: Sequence[str]) -> None:
    """Columns of a weight that two modules hold would be tuned in both."""
    holders: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(parameter.data_ptr(), []).append(path)
    for path in paths:
        shared = holders[model.get_submodule(path).weight.data_ptr()]  # type: ignore[union-attr,operator]
        if len(shared) > 1:
            raise Refused(f"{path} is tied: its weight is also {', '.join(n for n in shared if path not in n)}")


def _group(path: str) -> str:
    """What Linears of one input have in common: where they sit, and which of TOGETHER they belong to."""
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.{next((names[0] for names in TOGETHER if leaf in names), leaf)}"


def _groups(model: nn.Module, targets: set[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if path.rsplit(".", 1)[-1] in targets and isinstance(module, (nn.Linear, AdaptedLinear)):
            groups.setdefault(_group(path), []).append(path)
    return list(groups.values())


def _inputs(model: nn.Module, paths: Sequence[str]) -> int:
    found = {_inner(model, path).in_features for path in paths}
    assert len(found) == 1, f"{', '.join(paths)} read inputs of {found}"
    return found.pop()


def _inner(model: nn.Module, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    inner = module.inner if isinstance(module, AdaptedLinear) else module
    assert isinstance(inner, nn.Linear)
    return inner


def _drawn(inputs: int, r: int, seed: int, where: str) -> Tensor:
    """r of the inputs by chance: other ones at every place, the same for the same seed."""
    digest = hashlib.sha256(f"{seed} {where}".encode()).digest()
    chance = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(inputs, generator=chance)[:r].sort().values


def _best(scores: Tensor, r: int) -> Tensor:
    return scores.cpu().topk(r).indices.sort().values


def _scores(
    model: nn.Module,
    name: str,
    groups: Sequence[Sequence[str]],
    choice: Choice,
    loss: Callable[[], Tensor] | None,
) -> dict[str, Tensor]:
    """[in] for each group, by its first path: how much each column counts; nothing where chance decides."""
    if choice == "random":
        return {}
    if choice == "gradient":
        if loss is None:
            raise Refused("choice 'gradient' looks at a first batch: give loss, a function that returns its loss")
        return _pulls(model, name, groups, loss)
    found = {}
    for paths in groups:
        weights = [_inner(model, path) for path in paths]
        if not all(map(is_dense, weights)):
            raise Refused(f"choice 'norm' reads weights, and those of {paths[0]} are not dense: choose 'random'")
        found[paths[0]] = torch.stack([w.weight.detach().float().pow(2).sum(0) for w in weights]).sum(0)
    return found


def _pulls(
    model: nn.Module, name: str, groups: Sequence[Sequence[str]], loss: Callable[[], Tensor]
) -> dict[str, Tensor]:
    """Squared length of each column's gradient, of a batch that runs with every column tuned."""
    found: dict[str, Tensor] = {}

    def note(first: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        score = parameter.grad.float().pow(2).sum(0)
        found[first] = found[first] + score if first in found else score
        parameter.grad = None  # one weight's gradient at a time

    for paths in groups:
        inner = _inner(model, paths[0])
        everything = torch.arange(inner.in_features, device=inner.weight.device)
        for part in _put(model, name, paths, everything).values():
            part.delta.register_post_accumulate_grad_hook(partial(note, paths[0]))
    worn = {path: module.worn for path, module in adapted_linears(model, name).items()}
    for path in worn:
        adapted_at(model, path).worn = name
    with torch.enable_grad():
        loss().backward()  # type: ignore[no-untyped-call]
    for path, before in worn.items():
        adapted_at(model, path).worn = before
    if missing := [paths[0] for paths in groups if paths[0] not in found]:
        raise Refused(f"no gradient of the first batch reaches {missing[0]}: choose columns by 'random'")
    return found


def _put(model: nn.Module, name: str, paths: Sequence[str], columns: Tensor) -> dict[str, Columns]:
    gather, parts = Gather(), {}
    for path in paths:
        parts[path] = Columns(_inner(model, path).out_features, columns.clone(), gather)
        put_part(model, path, name, parts[path])
    return parts


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _before(model: nn.Module, args: Any) -> None:
    """Before the whole model runs: a compiled one does not look at its columns by itself."""
    refresh(model)
