"""Counts the rows that run through each module, by listening where the engine runs its passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from heliostat.engine.batch import Pass
from heliostat.engine.engine import Engine
from heliostat.serve.roster import family_name


@dataclass(slots=True)
class Rows:
    """Rows and passes by module so far, by the family's names. The engine's thread writes, others read."""

    rows: Counter[str] = field(default_factory=Counter)
    passes: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, engine: Engine) -> Rows:
        """Counts from now on."""
        found, run = cls(), engine.runner.run

        def counted(passes: Sequence[Pass], *rest: Any, **more: Any) -> Any:
            found.count(passes)
            return run(passes, *rest, **more)

        engine.runner.run = counted  # type: ignore[method-assign]
        return found

    def count(self, passes: Sequence[Pass]) -> None:
        """Take in what is about to run."""
        for each in passes:
            for segment in each.segments:
                module = family_name(segment.adapter or each.weights)
                self.rows[module] += segment.stop - segment.start
                self.passes[module] += 1
