"""Structured logs: one JSON object a line. Never a key, a prompt or an answer."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

MOST_WARNINGS = 100


@dataclass(slots=True)
class Log:
    """Writes to ``out``; ``None`` is silent."""

    out: TextIO | None = field(default_factory=lambda: sys.stderr)
    _warned: set[str] = field(default_factory=set)

    def say(self, event: str, **facts: Any) -> None:
        """One line; facts that are None are left out."""
        if self.out is None:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + "Z"
        told = {"time": now, "event": event, **{k: v for k, v in facts.items() if v is not None}}
        self.out.write(json.dumps(told) + "\n")  # at once: worker processes write to the same place
        self.out.flush()

    def warn_once(self, what: str, **facts: Any) -> None:
        """A warning the first time; somebody who sends ever new fields is heard a hundred times."""
        if what in self._warned or len(self._warned) >= MOST_WARNINGS:
            return
        self._warned.add(what)
        self.say("warning", message=what, **facts)
