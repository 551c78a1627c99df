"""Random weights of one shape in memory, and an engine around those that a system needs.

Each module has tensors of its own, so that reading them costs what it costs. What systems have in common (whole models
of members, the base) lies in memory once; nobody writes to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from heliostat.bench.decode import SHAPES, shape
from heliostat.bench.systems import WHOLE, System, rank
from heliostat.bench.trial import EMBEDDED_BASE
from heliostat.build import Loaded, best_dtype
from heliostat.engine.engine import Engine
from heliostat.errors import Refused
from heliostat.family import BASE
from heliostat.linear.lora import LowRank, add_adapter, parts_of
from heliostat.model.config import parse_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Transformer
from heliostat.train.recipe import TARGETS


class Stand:
    """Modules by name, each made when it is first asked for."""

    def __init__(self, name: str, *, seed: int = 0, dtype: torch.dtype | None = None) -> None:
        """``name``: one of SHAPES; ``dtype``: the fastest of this machine where it is left out."""
        if name not in SHAPES:
            raise Refused(f"no shape {name!r}; there is: {', '.join(SHAPES)}")
        self.config = parse_config(shape(name))
        self.dtype = dtype or best_dtype()
        self._seed = seed
        self._tokenizer = Tokenizer.load(EMBEDDED_BASE)
        self._loaded: dict[str, Loaded] = {}

    def modules(self, system: System, members: Sequence[str]) -> dict[str, Loaded]:
        """What the rows of these members name."""
        names = dict.fromkeys(m for row in system.rows(members).values() for m in row.modules)
        return {name: self._module(name, system) for name in names}

    def engine(self, system: System, members: Sequence[str], *, pages: int, most: int = 64) -> Engine:
        """A fresh engine, its pages empty, around a system's modules; at most ``most`` requests run at once."""
        modules, longest = self.modules(system, members), self.config.max_length
        return Engine(modules, self._tokenizer, max_length=longest, pages=pages, max_running=most)

    def bytes(self, system: System, members: Sequence[str]) -> int:
        """Memory of a system's weights, adapters and all; of adapters of other systems on the same base nothing."""
        found = 0
        for loaded in self.modules(system, members).values():
            if loaded.adapter is not None:
                parts = parts_of(loaded.model, loaded.adapter).values()
                found += sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
        weights = {loaded.weights for loaded in self.modules(system, members).values()}
        return found + len(weights) * self.config.parameters * self.dtype.itemsize

    def _module(self, name: str, system: System) -> Loaded:
        if name not in self._loaded:
            whole = name == BASE or system.kind == WHOLE
            self._loaded[name] = self._made(name) if whole else self._worn(name, system)
        return self._loaded[name]

    def _made(self, name: str) -> Loaded:
        torch.manual_seed(self._seed + len(self._loaded))
        model = Transformer(self.config).to(self.dtype).requires_grad_(False)
        model.join()
        return Loaded(name, f"random {name}", name, model)

    def _worn(self, name: str, system: System) -> Loaded:
        base = self._module(BASE, system).model
        torch.manual_seed(self._seed + len(self._loaded))
        r = rank(self.config.width)
        add_adapter(base, name, r=r, alpha=2 * r, targets=TARGETS[system.kind])
        for part in parts_of(base, name).values():
            assert isinstance(part, LowRank)
            torch.nn.init.normal_(part.b, std=0.02)
            part.to(self.dtype).requires_grad_(False)
        return Loaded(name, f"random {name}", BASE, base, name)
