"""What is known of each prompt, in a file of its own, so that work that is killed goes on where it was.

A folder is named by everything that its labels hang on: with another speaker, draft or file of prompts it is another folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heliostat.errors import Refused
from heliostat.files import atomic_write_text
from heliostat.judging.labels import Scored
from heliostat.model.weights import read_tensors, save_tensors

FACTS = "facts.json"
PARTS = ("places", "tokens", "scores", "hidden")
_CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Kept:
    """A folder of labels."""

    folder: Path

    @classmethod
    def open(cls, parent: Path, facts: Mapping[str, Any]) -> Kept:
        """The folder of these facts under ``parent``, made where it is not there."""
        text = json.dumps(facts, sort_keys=True, indent=1)
        folder = parent / hashlib.sha256(text.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / FACTS).exists():
            atomic_write_text(folder / FACTS, text + "\n")
        return cls(folder)

    def _scored(self, line: int) -> Path:
        return self.folder / f"line-{line:06}.safetensors"

    def _changed(self, line: int) -> Path:
        return self.folder / f"line-{line:06}.changed.safetensors"

    def scored(self, line: int) -> Scored | None:
        """What was scored of the prompt of that line; None where nothing was yet, or what there is is damaged."""
        found = _read(self._scored(line), PARTS)
        return None if found is None else Scored(**found)

    def keep(self, line: int, scored: Scored) -> None:
        """Write it, whole or not at all."""
        save_tensors({part: getattr(scored, part) for part in PARTS}, self._scored(line))

    def changed(self, line: int) -> list[bool] | None:
        """Which tokens change that answer's result; empty where it is no measure; None where nobody looked yet."""
        found = _read(self._changed(line), (_CHANGED,))
        return None if found is None else [bool(value) for value in found[_CHANGED].tolist()]

    def keep_changed(self, line: int, changed: list[bool] | None) -> None:
        """Write it; None: this answer is no measure."""
        save_tensors({_CHANGED: torch.tensor(changed or [], dtype=torch.bool)}, self._changed(line))


def _read(path: Path, parts: tuple[str, ...]) -> dict[str, Tensor] | None:
    """The tensors of a file; None where it is not there or not whole, for then it is made again."""
    if not path.is_file():
        return None
    try:
        found = dict(read_tensors([path]))
    except Refused:
        return None
    return found if set(found) == set(parts) else None
