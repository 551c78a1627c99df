"""Every step of a run in one jsonl: loss, gradient norm, learning rate. What a killed run wrote too much is cut off."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from heliostat.errors import Refused
from heliostat.files import atomic_write_text
from heliostat.train.loop import Watch

NAME = "steps.jsonl"
KEPT = ("step", "loss", "grad_norm", "learning_rate", "tokens", "seconds")


class StepLog:
    """Watches beside somebody else and writes down each step, the first of this session behind the one before it."""

    def __init__(self, watch: Watch, path: Path) -> None:
        self.watch, self.path = watch, path
        self._file: TextIO | None = None

    def step(self, record: Mapping[str, Any]) -> None:
        """See one step."""
        if self._file is None:
            self._file = self._begin(record["step"])
        self._file.write(json.dumps({key: record[key] for key in KEPT}) + "\n")
        self._file.flush()
        self.watch.step(record)

    def close(self) -> None:
        """No step comes any more."""
        if self._file is not None:
            self._file.close()

    def _begin(self, first: int) -> TextIO:
        """The log up to the checkpoint that this session went on from; later lines will be written again."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        atomic_write_text(self.path, "".join(line + "\n" for line in lines[: first - 1]))
        return self.path.open("a", encoding="utf-8")


@contextmanager
def logging_steps(watch: Watch, path: Path) -> Iterator[StepLog]:
    """``watch``, and every step beside it in the file at ``path``."""
    log = StepLog(watch, path)
    try:
        yield log
    finally:
        log.close()


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The steps of a log; refused, by line, where one is missing or cannot be read."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            whole = record["step"] == number
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise Refused(f"{path}:{number}: step {number} is not there, or cannot be read")
        records.append(record)
    return records
