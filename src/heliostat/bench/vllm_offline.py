"""vLLM workers of one process each, without a server: started as ``vllm.launch`` says, asked by lines (``vllm.offline``)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from heliostat.errors import Refused
from heliostat.vllm.launch import Launch, command


class Offline:
    """One of them. ``python``: that of an environment with vLLM and heliostat; its log goes to the file ``log``."""

    def __init__(
        self, launch: Launch, *, python: str, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.launch, self.log = launch, log
        made = command(launch, python=python)
        words = [python, "-m", "heliostat.vllm.offline", *made.words[3:]]
        apart = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(environment or {})}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                words,
                env={**os.environ, **made.environment, **apart},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def __enter__(self) -> Offline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def ready(self) -> Offline:
        """Itself, when it can be asked. Refused, with the end of its log, where it does not start."""
        self._heard("READY")
        return self

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What it says to all of them, asked as one crowd."""
        return self.timed(requests)[0]

    def timed(self, requests: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], float]:
        """The same, and the seconds that it took."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(list(requests)) + "\n")
        self.process.stdin.flush()
        said = json.loads(self._heard("ANSWERS "))
        return said["answers"], said["seconds"]

    def _heard(self, word: str) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise Refused(
            f"worker {self.launch.name!r} has ended:\n{self.log.read_text(errors='replace')[-3000:]}"
        )


@contextmanager
def offline(
    *launches: Launch, python: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[list[Offline]]:
    """These workers, started at once; their logs lie in the folder ``log``."""
    started = [
        Offline(one, python=python, log=log / f"{one.name}.log", environment=environment) for one in launches
    ]
    try:
        yield [one.ready() for one in started]
    finally:
        for one in started:
            one.__exit__()
