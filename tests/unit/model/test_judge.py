"""A judge scores rows alone, comes back from its file as it was, and is refused for others than it knows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from heliostat.errors import Refused
from heliostat.model.judge import Judge, judge_file, judge_name, read_judge, write_judge

SPEAKER, DRAFT = "a" * 64, "b" * 64


def a_judge(width: int = 8, **facts: Any) -> Judge:
    torch.manual_seed(0)
    told: dict[str, Any] = {
        "theta": 0.7,
        "thetas": {"recall": 0.7, "f1": 0.4},
        "report": {"labels": 3},
    } | facts
    return Judge(torch.randn(width), 0.3, SPEAKER, DRAFT, speaker_module="base", draft_module="small", **told)


@given(rows=st.integers(1, 9), seed=st.integers(0, 99))
def test_scores_are_the_logistic_function_and_a_batch_changes_none(rows: int, seed: int) -> None:
    judge = a_judge(40)
    hidden = torch.randn(rows, 40, generator=torch.Generator().manual_seed(seed))
    plain = 1 / (1 + torch.exp(-(hidden.double() @ judge.weight.double() + judge.bias)))
    scores = judge.scores(hidden)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), plain, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(judge.scores(hidden[n : n + 1])[0], scores[n]) for n in range(rows))


def test_it_comes_back_as_it_was_written(tmp_path: Path) -> None:
    judge = a_judge(thetas={"recall": 0.9, "f1": math.inf}, theta=math.inf)
    name = judge_name("base", "small")
    assert write_judge(tmp_path, name, judge) == judge_file(tmp_path, name)
    again = read_judge(tmp_path, name)
    assert torch.equal(again.weight, judge.weight) and again.bias == pytest.approx(judge.bias)
    for fact in ("speaker", "draft", "speaker_module", "draft_module", "theta", "thetas", "report"):
        assert getattr(again, fact) == getattr(judge, fact), fact


def test_another_speaker_or_draft_is_refused_with_the_command() -> None:
    judge = a_judge()
    judge.check(SPEAKER, DRAFT)
    command = "heliostat judge fam --speaker base --draft small --data PROMPTS.jsonl"
    with pytest.raises(Refused, match=f"speaker 'base' of digest aaaaaaaaaaaa.*cccc.*{command}"):
        judge.check("c" * 64, DRAFT, folder="fam")
    with pytest.raises(Refused, match=f"draft 'small' of digest bbbbbbbbbbbb.*cccc.*{command}"):
        judge.check(SPEAKER, "c" * 64, folder="fam")


def test_what_is_missing_or_misnamed_is_refused(tmp_path: Path) -> None:
    write_judge(tmp_path, "there", a_judge())
    with pytest.raises(Refused, match="no judge 'gone'; there is: there .*heliostat judge"):
        read_judge(tmp_path, "gone")
    with pytest.raises(Refused, match="no judge's name"):
        read_judge(tmp_path, "../there")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"kind": "other"}, "no judge that this heliostat reads"),
        ({"version": "2"}, "no judge that this heliostat reads"),
        ({"theta": "1.5"}, "theta is 1.5"),
        ({"theta": "true"}, "theta is True"),
        ({"theta": "NaN"}, "theta is nan"),
        ({"theta": "{"}, "its theta cannot be read"),
        ({"thetas": "[]"}, "must be objects"),
        ({"thetas": '{"f1": "x"}'}, "f1 is 'x'"),
        ({"speaker": ""}, "it lacks speaker"),
        ({"weight": torch.zeros(2, 2)}, "weight is"),
        ({"weight": torch.zeros(8, dtype=torch.float64)}, "weight is"),
        ({"bias": torch.zeros(2)}, "bias"),
        ({"bias": torch.tensor([math.nan])}, "not finite"),
        ({"more": torch.zeros(1)}, "no judge: it holds bias, more, weight"),
    ],
)
def test_an_odd_file_is_refused(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    metadata = {"kind": "heliostat.judge", "version": "1", "speaker": SPEAKER, "draft": DRAFT}
    metadata |= {"speaker_module": "base", "draft_module": "small", "theta": "0.5"}
    metadata |= {"thetas": json.dumps({"f1": 0.5}), "report": "{}"}
    tensors = {"weight": torch.zeros(8), "bias": torch.zeros(1)}
    path = judge_file(tmp_path, "odd")
    path.parent.mkdir()
    save_file(tensors, path, metadata=metadata)
    read_judge(tmp_path, "odd")
    tensors |= {key: value for key, value in change.items() if isinstance(value, torch.Tensor)}
    metadata |= {key: value for key, value in change.items() if isinstance(value, str)}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(Refused, match=word):
        read_judge(tmp_path, "odd")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = write_judge(tmp_path, "cut", a_judge())
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(Refused, match="damaged or not safetensors"):
        read_judge(tmp_path, "cut")
