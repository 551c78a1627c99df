"""Our transformer around the parameters of a model of transformers: the same tensors, in training the same gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from heliostat.errors import Refused
from heliostat.linear.lora import AdaptedLinear
from heliostat.model.config import parse_config
from heliostat.model.transformer import Transformer


def mirrored(model: nn.Module, *, copied: bool = False) -> Transformer:
    """Our transformer over ``model``'s own parameters, adapters of ours included; or over frozen copies of them.

    Raises Refused for an architecture, an option or a tensor that heliostat has not.
    """
    made: Any = getattr(model, "config", None)
    if made is None or not hasattr(made, "to_dict"):
        raise Refused(f"{type(model).__name__} is no causal LM of transformers: it has no config")
    config = parse_config({key: value for key, value in made.to_dict().items() if value is not None})
    with torch.device("meta"):
        ours = Transformer(config)
    adapted = {path: m for path, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    for path, module in adapted.items():
        parent, _, leaf = path.rpartition(".")
        setattr(_place(ours, parent, model), leaf, module)
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if any(name.startswith(f"{path}.") for path in adapted):
            continue
        place = _place(ours, owner, model)
        if leaf not in place._parameters:
            raise Refused(f"{type(model).__name__} has {name}, which heliostat's transformer has not")
        own = nn.Parameter(parameter.detach().clone(), requires_grad=False) if copied else parameter
        place.register_parameter(leaf, own)
    if config.tied:
        ours.lm_head.weight = ours.model.embed_tokens.weight
    if lacking := [name for name, parameter in ours.named_parameters() if parameter.is_meta]:
        raise Refused(f"{type(model).__name__} lacks {lacking[0]}")
    ours.register_buffer("frequencies", Transformer.rotary(config).to(ours.device), persistent=False)
    return ours


def _place(ours: Transformer, path: str, model: nn.Module) -> nn.Module:
    try:
        return ours.get_submodule(path)
    except AttributeError as error:
        raise Refused(f"{type(model).__name__} has {path}, which heliostat's transformer has not") from error
