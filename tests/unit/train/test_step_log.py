"""The log of steps: every step once, whatever was cut in between."""

from pathlib import Path
from typing import Any

import pytest

from heliostat.errors import Refused
from heliostat.train.step_log import logging_steps, read_steps
from heliostat.train.watch import Silent


def record(step: int, norm: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": 2.0, "grad_norm": norm, "learning_rate": 1e-3, "tokens": 8, "seconds": 0.1}


def run(path: Path, steps: range, norm: float) -> None:
    with logging_steps(Silent(), path) as log:
        for step in steps:
            log.step(record(step, norm) | {"eval_loss": 1.0})


def test_what_was_written_after_the_checkpoint_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    run(path, range(1, 8), 1.0)  # killed in step 8; its last checkpoint was of step 4
    run(path, range(5, 11), 2.0)
    found = read_steps(path)
    assert [r["step"] for r in found] == list(range(1, 11))
    assert [r["grad_norm"] for r in found] == [1.0] * 4 + [2.0] * 6
    run(path, range(1, 3), 3.0)  # begun anew
    assert [r["grad_norm"] for r in read_steps(path)] == [3.0, 3.0]


@pytest.mark.parametrize("cut", ['{"step": 2, "lo', '{"step": 3}', "[]"])
def test_a_step_that_is_missing_is_named(tmp_path: Path, cut: str) -> None:
    path = tmp_path / "steps.jsonl"
    run(path, range(1, 2), 1.0)
    path.write_text(path.read_text() + cut + "\n")
    with pytest.raises(Refused, match=r"steps.jsonl:2: step 2 is not there"):
        read_steps(path)


def test_a_run_that_ends_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    with logging_steps(Silent(), tmp_path / "steps.jsonl"):
        pass
    assert not (tmp_path / "steps.jsonl").exists()
