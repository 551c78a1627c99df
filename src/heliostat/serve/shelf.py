"""A family's modules in memory, each under a name that carries its digest, read from the folder as it is now."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from heliostat.build import Loaded, module_folder, read_family, verify_module
from heliostat.engine.ledger import available_memory, weights_of
from heliostat.errors import Refused
from heliostat.family import Family, Module
from heliostat.linear.adapter import load_adapter
from heliostat.model.config import read_config
from heliostat.model.transformer import Transformer
from heliostat.model.weights import load_transformer
from heliostat.serve.roster import module_name

REMEDY = "Unload a member that is not needed first, or start the server with a smaller --cache-mib"


@dataclass(frozen=True, slots=True)
class Arrival:
    """Modules read from the folder: weights are in memory, adapters still lie on the disk."""

    modules: Mapping[str, Module]
    """By the engine's names."""
    weights: Mapping[str, str]
    """The engine's name of each module -> that of the weights it runs on."""
    models: Mapping[str, Transformer]
    """Weights that were not in memory before."""


@dataclass(slots=True)
class Shelf:
    """What is in memory. ``read`` may run beside the engine; ``put`` changes models, so nothing may run meanwhile."""

    folder: Path
    dtype: torch.dtype
    device: str = "cpu"
    tokenizer: str = ""
    """Digest of the tokenizer that serves: a family that has another one by now is refused."""
    held: dict[str, Loaded] = field(default_factory=dict)
    models: dict[str, Transformer] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read_modules(self, modules: Mapping[str, str]) -> Arrival:
        """Modules as the folder has them now, by the family's names; ``modules``: the digests that they must have.

        Their files are checked first. Refused where one is another by now, or there is no memory for it.
        """
        with self._lock:
            family = read_family(self.folder)
            self._check(family, modules)
            self._refuse_too_large(family, modules)
            names = {module: _named(family, module) for module in modules}
            weights = {names[module]: _named(family, family.module(module).weights) for module in names}
            models = {
                weight: self._model(family, family.module(module).weights)
                for module, weight in zip(names, weights.values(), strict=True)
                if weight not in self.models
            }
            return Arrival({names[module]: family.module(module) for module in names}, weights, models)

    def _check(self, family: Family, modules: Mapping[str, str]) -> None:
        if self.tokenizer and family.tokenizer != self.tokenizer:
            raise Refused("the family has another tokenizer than the one that serves: start the server again")
        for name, digest in modules.items():
            if family.module(name).digest != digest:
                raise Refused(
                    f"module {name!r} was asked for with digest {digest[:12]} and the folder has "
                    f"{family.module(name).digest[:12]} by now: ask again"
                )
            verify_module(self.folder, family, name)

    def _refuse_too_large(self, family: Family, modules: Collection[str]) -> None:
        """Pages and workspace are there already: what comes on top is weights."""
        held = self.held.keys() | self.models.keys()
        there = {name for name in family.modules if _named(family, name) in held}
        arriving = weights_of(self.folder, family, modules, dtype=self.dtype, there=there)
        arriving.refuse_over(available_memory(self.device), remedy=REMEDY)

    def _model(self, family: Family, weights: str) -> Transformer:
        path = module_folder(self.folder, family.module(weights))
        model = load_transformer(path, read_config(path), dtype=self.dtype, device=self.device)
        model.join()
        return model

    def put(self, arrival: Arrival) -> dict[str, Loaded]:
        """Keep what arrived, adapters on their weights; returns the modules that were not held before."""
        for weight, model in arrival.models.items():
            self.models.setdefault(weight, model)
        new = {}
        for name, module in arrival.modules.items():
            if name in self.held:
                continue
            weights = arrival.weights[name]
            if module.base is not None:
                load_adapter(module_folder(self.folder, module), self.models[weights], name)
            adapter = name if module.base is not None else None
            new[name] = Loaded(name, module.digest, weights, self.models[weights], adapter)
        self.held |= new
        return new

    def forget(self, names: Collection[str]) -> None:
        """Let go of modules that the engine has unloaded, and of weights that nothing runs on any more."""
        for name in names:
            self.held.pop(name, None)
        used = {module.weights for module in self.held.values()}
        for weight in self.models.keys() - used:
            del self.models[weight]


def _named(family: Family, name: str) -> str:
    return module_name(name, family.module(name).digest)
