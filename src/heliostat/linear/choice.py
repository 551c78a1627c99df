"""Which columns of which Linears are tuned (PaCA, arXiv 2503.01905): by chance, by their length, by a first gradient."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from heliostat.errors import Refused
from heliostat.linear.columns import Columns, Gather, is_dense
from heliostat.linear.lora import AdaptedLinear, adapted_linears, put_part, remove_adapter

Choice = Literal["random", "norm", "gradient"]
"""How columns are chosen: by chance, the longest ones, or those on which the first batch pulls most."""
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that read one input: they tune the same columns, so that those are gathered once."""


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
    found = {inner_of(model, path).in_features for path in paths}
    assert len(found) == 1, f"{', '.join(paths)} read inputs of {found}"
    return found.pop()


def inner_of(model: nn.Module, path: str) -> nn.Linear:
    """The Linear at ``path`` itself, with or without adapters on it."""
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
            raise Refused(
                "choice 'gradient' looks at a first batch: give loss, a function that returns its loss"
            )
        return _pulls(model, name, groups, loss)
    found = {}
    for paths in groups:
        weights = [inner_of(model, path) for path in paths]
        if not all(map(is_dense, weights)):
            raise Refused(
                f"choice 'norm' reads weights, and those of {paths[0]} are not dense: choose 'random'"
            )
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
        inner = inner_of(model, paths[0])
        everything = torch.arange(inner.in_features, device=inner.weight.device)
        for part in _put(model, name, paths, everything).values():
            part.delta.register_post_accumulate_grad_hook(partial(note, paths[0]))
    linears = adapted_linears(model, name).values()
    worn = [module.worn for module in linears]
    for module in linears:
        module.worn = name
    try:
        with torch.enable_grad():
            loss().backward()
    finally:
        for module, before in zip(linears, worn, strict=True):
            module.worn = before
        remove_adapter(model, name)
    if missing := [paths[0] for paths in groups if paths[0] not in found]:
        raise Refused(f"no gradient of the first batch reaches {missing[0]}: choose columns by 'random'")
    return found


def _put(model: nn.Module, name: str, paths: Sequence[str], columns: Tensor) -> dict[str, Columns]:
    gather, parts = Gather(), {}
    for path in paths:
        parts[path] = Columns(inner_of(model, path).out_features, columns.clone(), gather)
        put_part(model, path, name, parts[path])
    return parts
