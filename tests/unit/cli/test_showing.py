"""`demo` hands its options on, prints its results as JSON when asked, and ends on Ctrl-C with a way on."""

import json
from pathlib import Path
from typing import Any

import pytest

from heliostat.train.loop import Interrupted
from tests.unit.cli.conftest import Heliostat


def test_demo_hands_its_options_on(
    heliostat: Heliostat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[dict[str, Any]] = []

    def main(**options: Any) -> dict[str, Any]:
        calls.append(options)
        return {"seconds": 1}

    monkeypatch.setattr("heliostat.bench.demo.main", main)
    assert heliostat("demo", "--out", tmp_path).stdout == ""
    words = ["--out", tmp_path, "--task", "math", "--steps", 3, "--json"]
    assert json.loads(heliostat("demo", *words).stdout) == {"seconds": 1}
    assert calls == [
        {"out": tmp_path, "task": "tools", "as_json": False},
        {"out": tmp_path, "task": "math", "steps": 3, "as_json": True},
    ]


def test_demo_refuses_a_task_there_is_none_of(heliostat: Heliostat) -> None:
    assert "did you mean 'tools'" in heliostat("demo", "--task", "tool", status=2).stderr


def test_ctrl_c_says_how_it_goes_on(heliostat: Heliostat, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(**_: Any) -> None:
        raise Interrupted("stopped after step 3 of 9")

    monkeypatch.setattr("heliostat.bench.demo.main", main)
    stderr = heliostat("demo", status=130).stderr
    assert stderr == "stopped after step 3 of 9; the same command goes on from there\n"
