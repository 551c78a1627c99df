"""How far a command is that goes through so many things: a bar on stderr, or a line now and then with ``--json``."""

from __future__ import annotations

import json
import sys


class Advance:
    """Things done and what is being done, on stderr; with ``--json`` a line for every so many things."""

    def __init__(self, what: str, *, as_json: bool, every: int = 1) -> None:
        """Rich is imported here: `--help` needs none."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        self.as_json, self.every, self.done, self.total = as_json, every, 0, 0
        self.progress = Progress(*columns, console=Console(stderr=True), disable=as_json)
        self.task = self.progress.add_task(what, total=None, facts="")

    def __enter__(self) -> Advance:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def tell(self, done: int, total: int, what: str) -> None:
        """See how far it is."""
        if self.as_json and done // self.every != self.done // self.every:
            print(json.dumps({"done": done, "of": total, "what": what}), file=sys.stderr, flush=True)
        self.done, self.total = done, total
        self.progress.update(self.task, completed=done, total=total, facts=what)
