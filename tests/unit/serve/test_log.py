"""The log: one JSON object a line, written at once."""

import io
import json

from heliostat.serve.log import MOST_WARNINGS, Log


class Writes(io.StringIO):
    """Remembers each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


def test_a_line_is_one_write_so_that_processes_do_not_mix_theirs() -> None:
    out = Writes()
    Log(out).say("request", status=200, nothing=None)
    (line,) = out.writes
    assert line.endswith("\n") and json.loads(line) | {"time": ""} == {
        "time": "",
        "event": "request",
        "status": 200,
    }


def test_a_warning_comes_once_and_not_without_end() -> None:
    out = Writes()
    log = Log(out)
    for number in range(2 * MOST_WARNINGS):
        log.warn_once(f"field {number // 2}")
    assert len(out.writes) == MOST_WARNINGS
    Log(None).say("nobody listens")
