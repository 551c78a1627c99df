"""kill -9 while labels are made: what was labelled stays, the same command goes on, and the judge is the same."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from heliostat.export import import_draft
from heliostat.judging.run import JUDGING
from heliostat.model.judge import read_judge

pytestmark = pytest.mark.slow

WAIT = 120.0


def command(family: Path, data: Path) -> list[str]:
    words = [
        "judge",
        str(family),
        "--draft",
        "small",
        "--data",
        str(data),
        "--metric",
        "exact",
        "--tau",
        "-4",
    ]
    program = "import sys; from heliostat.cli import main; main()"
    return [sys.executable, "-c", program, *words, "--max-tokens", "60", "--no-picture", "--json"]


def labelled(family: Path) -> set[Path]:
    return set((family / JUDGING).glob("*/line-*.safetensors"))


def test_a_killed_judge_goes_on(
    bare_family: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import_draft(bare_family, "small", make_checkpoint(seed=5, num_hidden_layers=1))
    whole = Path(shutil.copytree(bare_family, tmp_path / "whole"))
    data = tmp_path / "prompts.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": f"add {n} and {m}"}) + "\n" for n in range(30) for m in range(10))
    )
    started = subprocess.Popen(
        command(bare_family, data), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + WAIT
    while len(labelled(bare_family)) < 20 and started.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    before = {path: path.stat().st_mtime_ns for path in labelled(bare_family)}
    assert 20 <= len(before) < 300 and not (bare_family / "judges").exists()
    done = subprocess.run(command(bare_family, data), capture_output=True, text=True, check=True)
    assert sum(json.loads(done.stdout)["prompts"]) == 300
    assert len(labelled(bare_family)) == 300
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert not list((bare_family / JUDGING).glob("*/*.partial-*"))
    subprocess.run(command(whole, data), capture_output=True, check=True)
    again, plain = (read_judge(family, "base-small") for family in (bare_family, whole))
    torch.testing.assert_close(again.weight, plain.weight, rtol=1e-2, atol=1e-4)
    assert again.thetas == pytest.approx(plain.thetas, abs=1e-2)
