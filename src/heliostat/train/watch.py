"""What a person sees while training: one live line with loss, speed, time left and memory; a picture at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from heliostat.files import atomic_write_text
from heliostat.plot import lines


class Bar:
    """A progress bar on stderr; ``--json`` runs and pipes get one line a logged step instead."""

    def __init__(self, total: int, *, what: str, as_json: bool = False, every: int = 10) -> None:
        self.total, self.as_json, self.every = total, as_json, every
        self.console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console, transient=False, disable=as_json)
        self.task = self.progress.add_task(what, total=total, facts="")
        self._speed = 0.0
        self._judged: dict[str, float] = {}  # the last evaluation stays in sight until the next one

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, record: Mapping[str, Any]) -> None:
        """Show one step's record (see ``loop.take_step``)."""
        now = record["tokens"] / max(record["seconds"], 1e-9)
        self._speed = now if not self._speed else 0.9 * self._speed + 0.1 * now
        if self.as_json:
            if record["step"] % self.every == 0 or record["step"] == self.total:
                print(json.dumps(record), file=sys.stderr, flush=True)
            return
        self._judged = {k: v for k, v in record.items() if k.startswith("eval_")} or self._judged
        judged = "".join(f"  {k.replace('_', ' ')} {v:.3g}" for k, v in self._judged.items())
        facts = f"loss {record['loss']:.3f}{judged}  {self._speed:,.0f} tokens/s  {resident_mib():,.0f} MiB"
        self.progress.update(self.task, completed=record["step"], facts=facts)


class Silent:
    """Nobody looks on."""

    def step(self, record: Mapping[str, Any]) -> None:
        """Nothing."""


def resident_mib() -> float:
    """Memory this process holds now, MiB (its peak where the system does not tell)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * 4096 / 2**20
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def draw_loss(history: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Write the loss curve as SVG, with evaluation losses and accuracies where there are any."""
    series = {"training": _curve(history, "loss")}
    if judged := _curve(history, "eval_loss"):
        series["evaluation"] = judged
    right = _curve(history, "eval_accuracy")
    shares = {"right answers": right} if right else None
    atomic_write_text(path, lines(series, title=title, x="step", y="loss, nats a token", shares=shares))


def _curve(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(r["step"], r[name]) for r in history if name in r]
