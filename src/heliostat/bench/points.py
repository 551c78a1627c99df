"""Points of a long measurement, each kept as it is measured: killed at any time, the same command goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heliostat.errors import Refused
from heliostat.files import atomic_write_text, read_json


class Points:
    """What was measured, by name, in one file; a point is never measured twice."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.all: dict[str, Any] = {"facts": facts, "points": {}}
        if path.exists():
            self.all = read_json(path)
            if self.all.get("facts") != facts:
                raise Refused(
                    f"{path} holds points of another family, other data or other options: choose another --out, or "
                    "remove it"
                )

    def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
        """The point of that name, measured now where it is not there."""
        points = self.all["points"]
        if name not in points:
            points[name] = measure()
            atomic_write_text(self.path, json.dumps(self.all, indent=1) + "\n")
        return points[name]
