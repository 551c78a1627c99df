"""Ctrl-C while training saves, says so and exits with 130; the same command goes on to the same end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from heliostat.build import read_family
from tests.unit.cli.conftest import Heliostat

STEPS, CTRL_C = 12, 5
# The command line as it is, but somebody presses Ctrl-C while step CTRL_C is shown.
PROGRAM = f"""
import os, signal
from heliostat.cli import main
from heliostat.train.watch import Bar

def step(self, record, show=Bar.step):
    show(self, record)
    if record["step"] == {CTRL_C}:
        os.kill(os.getpid(), signal.SIGINT)

Bar.step = step
main()
"""


def words(data: Path, member: str) -> list[str]:
    pace = ["--max-steps", STEPS, "--max-length", 128, "--logging-steps", 1, "--learning-rate", 0.002]
    fixed = ["--member", member, "--sharing", "prefillshare", "--data", data, "--bf16", "false", "--json"]
    return [str(word) for word in [*fixed, *pace]]


def losses(family: Path, member: str) -> list[float]:
    lines = (family / "runs" / member / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_ctrl_c_while_training_then_the_same_command(
    heliostat: Heliostat, bare_family: Path, tiny_data: Path
) -> None:
    same = ["train", str(bare_family), *words(tiny_data, "m")]
    run = subprocess.run([sys.executable, "-c", PROGRAM, *same], capture_output=True, text=True)
    assert run.returncode == 130
    assert f"stopped after step {CTRL_C} of {STEPS}" in run.stderr
    assert "the same command goes on from there" in run.stderr and "Traceback" not in run.stderr
    assert run.stdout == "" and read_family(bare_family).members == {}

    assert f"going on after step {CTRL_C}" in heliostat(*same).stderr
    heliostat("train", bare_family, *words(tiny_data, "whole"))
    assert len(losses(bare_family, "m")) == STEPS
    assert losses(bare_family, "m") == pytest.approx(losses(bare_family, "whole"), rel=1e-5)
    family = read_family(bare_family)
    assert family.module("m.own").parameters == family.module("whole.own").parameters


def test_ctrl_c_while_answering_is_quiet(
    heliostat: Heliostat, tiny_family: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("heliostat.engine.engine.Engine.step", press)
    for command in (["generate", tiny_family, "--prompt", "a"], ["eval", tiny_family, "--data", tiny_data]):
        assert heliostat(*command, status=130).stderr.splitlines()[-1] == "stopped"
