"""`bench train` measures what it is told, says its verdicts and page, and refuses what cannot be measured."""

import json
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Heliostat

SMALL = ["--hidden-size", 64, "--layers", 2, "--vocabulary", 64, "--batch", 1, "--length", 8, "--spoken", 4]


def test_verdicts_and_page_are_said_or_all_numbers_as_json(heliostat: Heliostat, tmp_path: Path) -> None:
    words = ["bench", "train", *SMALL, "--tuners", "lora,paca", "--r", 4, "--dropbp", "0,0.5", "--no-peft"]
    words += ["--repeats", 5, "--loss-steps", 0, "--out", tmp_path]
    said = heliostat(*words).stdout
    assert "times the speed of the faster LoRA" in said and str(tmp_path / "tuning.md") in said
    found = json.loads(heliostat(*words, "--json").stdout)
    assert {row["case"] for row in found["rows"]} >= {"lora r 4", "paca r 8, dropbp 0.5"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tuners", "qlora"], "tuners qlora: there are"),
        (["--dropbp", "0,1"], "dropbp is 1.0"),
        (["--dropbp", "half"], "--dropbp half: numbers with commas"),
        (["--dropbp", "0.5"], "0 must be among them"),
        (["--repeats", 2], "at least 5"),
    ],
)
def test_what_cannot_be_measured_is_refused(heliostat: Heliostat, words: list[object], message: str) -> None:
    assert message in heliostat("bench", "train", *words, status=2).stderr
