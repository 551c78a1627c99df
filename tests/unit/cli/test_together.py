"""A command in several processes: what is said once, what fails everywhere, the right exit status."""

from pathlib import Path

import pytest

from heliostat.cli import together
from heliostat.errors import Refused


def test_it_is_alone_unless_started_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert together.started() == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert together.started() == 3


@pytest.mark.parametrize("count", [0, -1, 65])
def test_an_odd_number_of_processes_is_refused(count: int) -> None:
    with pytest.raises(Refused, match=f"--processes {count}: 1 to 64"):
        together.start(count, [])


def test_only_the_first_process_is_heard(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        together, "_RUN", "import os; print('I am', os.environ['RANK'], os.environ['WORLD_SIZE'])"
    )
    assert together.start(3, []) == 0
    assert capfd.readouterr().out == "I am 0 3\n"


def test_a_failure_of_another_process_is_told_and_ends_the_rest(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "import os, sys; sys.exit('no room' if os.environ['RANK'] == '1' else 0)"
    monkeypatch.setattr(together, "_RUN", program)
    assert together.start(2, []) == 1
    assert "no room" in capfd.readouterr().err
    stuck = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(3)\nwhile True: time.sleep(1)"
    monkeypatch.setattr(together, "_RUN", stuck)
    monkeypatch.setattr(together, "PATIENCE", 0.1)
    assert together.start(2, []) != 0


@pytest.mark.slow
def test_a_refusal_is_said_once(bare_family: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(bare_family), "--member", "m", "--sharing", "sun", "--data", "nowhere.jsonl"]
    assert together.start(2, words) == 2
    assert capfd.readouterr().err.count("nowhere.jsonl") == 1
