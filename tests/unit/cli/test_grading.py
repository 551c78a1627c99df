"""`eval`: the share of right answers, which the family remembers, and some wrong ones to look at."""

import json
import re
from pathlib import Path

import pytest

from heliostat.build import read_family
from heliostat.llm import LLM
from heliostat.train.evaluate import evaluate
from tests.unit.cli.conftest import Heliostat


def test_eval_counts_right_answers_and_the_family_remembers(
    heliostat: Heliostat, tiny_family: Path, tmp_path: Path
) -> None:
    (answer,) = LLM(tiny_family, members=["solo"]).generate("add 2 and 3", member="solo", max_tokens=245)
    assert answer.finish_reason == "stop" and answer.text
    data = tmp_path / "data.jsonl"
    items = [
        {"prompt": "add 2 and 3", "completion": right} for right in (answer.text, "never said", answer.text)
    ]
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    words = ["eval", tiny_family, "--member", "solo", "--data", data]
    facts = json.loads(heliostat(*words, "--json").stdout)
    assert (facts["accuracy"], facts["items"], facts["metric"], facts["cut"]) == (0.6667, 3, "exact", 0)
    assert [w["reference"] for w in facts["wrong"]] == ["never said"]
    assert read_family(tiny_family).member("solo").evaluation["accuracy"] == 0.6667
    shown = heliostat(*words, "--limit", 1).stdout
    assert "100.0 %" in shown and "wrong answers" not in shown and "cut" not in shown
    assert "100.0 % (exact)" in heliostat("inspect", tiny_family).stdout


def test_answers_that_are_cut_are_counted(
    heliostat: Heliostat, tiny_family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate.__kwdefaults__ is not None
    monkeypatch.setitem(evaluate.__kwdefaults__, "max_tokens", 1)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "add 2 and 3", "completion": "5"}\n' * 2)
    words = ["eval", tiny_family, "--member", "solo", "--data", data]
    assert json.loads(heliostat(*words, "--json").stdout)["cut"] == 2
    assert read_family(tiny_family).member("solo").evaluation["cut"] == 2
    assert re.search(r"cut by their length\W+2", heliostat(*words).stdout)


def test_the_base_is_graded_and_nothing_is_remembered(
    heliostat: Heliostat, tiny_family: Path, tiny_data: Path
) -> None:
    before = read_family(tiny_family)
    assert "items" in heliostat("eval", tiny_family, "--data", tiny_data, "--limit", 4).stdout
    assert read_family(tiny_family) == before


def test_what_cannot_be_graded_is_refused(heliostat: Heliostat, tiny_family: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "%s", "completion": "b"}\n' % ("ab" * 300)
    )
    long = heliostat("eval", tiny_family, "--member", "solo", "--data", data, status=2).stderr
    assert f"{data.name}:2: the prompt is too long, a request here has at most 256 tokens" in " ".join(
        long.split()
    )
    data.write_text('{"text": "one two"}\n')
    words = ["eval", tiny_family, "--member", "solo", "--data", data]
    assert "did you mean 'exact'" in heliostat(*words, "--metric", "exat", status=2).stderr
    assert "there is no answer to grade" in heliostat(*words, status=2).stderr
    assert (
        "gone.jsonl cannot be read" in heliostat("eval", tiny_family, "--data", "gone.jsonl", status=2).stderr
    )
