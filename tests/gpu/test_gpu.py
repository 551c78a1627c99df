"""The same promises on a CUDA device: greedy answers in float32 are the CPU's, and training's losses are, too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.llm import LLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = ["add 2 and 3", "what is left of ten less four?", "hello", "a b c d e f g h i j k l m n o p"]


def test_answers_of_every_member_are_those_of_the_cpu(tiny_family: Path) -> None:
    here, there = (LLM(tiny_family, dtype="float32", device=device) for device in ("cpu", "cuda"))
    for member in here.rows:
        said = [llm.generate(PROMPTS, member=member, max_tokens=24) for llm in (here, there)]
        assert [answer.ids for answer in said[0]] == [answer.ids for answer in said[1]], member


def test_training_on_the_device_has_the_cpus_losses(
    bare_family: Path, tiny_data: Path, tune_member: Callable[..., Any]
) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        done = tune_member(
            bare_family, f"on-{device}", "sun", tiny_data, max_steps=5, bf16=False, device=device
        )
        losses.append([record["loss"] for record in done.history])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=1e-3)
