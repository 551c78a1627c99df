"""The same promises on a CUDA device: greedy answers in float32 are the CPU's, recorded or not; so are training's losses."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.build import init_family
from heliostat.engine.graphs import CudaRecorder
from heliostat.llm import LLM
from heliostat.ops.decoding import RowPages, has_triton, plain_rows, torch_rows, triton_rows
from tests.unit.ops.test_decoding import made

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


def test_recorded_passes_give_the_answers_of_those_that_are_not(tiny_family: Path) -> None:
    llm = LLM(tiny_family, dtype="float32", device="cuda")
    runner = llm.engine.runner
    graphs = runner.graphs
    assert graphs is not None
    asked = [(prompt, member) for member in llm.rows for prompt in PROMPTS]
    options: dict[str, Any] = {
        "member": [member for _, member in asked],
        "max_tokens": 24,
        "ignore_eos": True,
    }
    said = {}
    for how, kept in (("off", None), ("first", graphs), ("again", graphs)):
        runner.graphs = kept
        said[how] = [answer.ids for answer in llm.generate([prompt for prompt, _ in asked], **options)]
    assert graphs.replays > 20 and len(graphs) > 0 and not graphs.failure
    assert said["off"] == said["first"] == said["again"]


@pytest.mark.parametrize("kind", ["affine+gated", "sink"])
def test_bases_of_every_kind_of_attention_answer_as_on_the_cpu(
    kind: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    init_family(tmp_path / "fam", make_checkpoint(model_type="heliostat_llama", attention={"kind": kind}))
    here, there = (LLM(tmp_path / "fam", dtype="float32", device=device) for device in ("cpu", "cuda"))
    for _ in range(3):  # as it is, recorded, replayed
        said = [llm.generate(PROMPTS, max_tokens=40, ignore_eos=True) for llm in (here, there)]
        assert [answer.ids for answer in said[0]] == [answer.ids for answer in said[1]]
    graphs = there.engine.runner.graphs
    assert graphs is not None and graphs.replays > 20 and not graphs.failure


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"rows": 1, "wide": 1},
        {"heads": 32, "kv_heads": 8, "width": 128, "slots": 16, "wide": 70},
        {"heads": 14, "kv_heads": 2, "width": 64, "slots": 16},
        {"heads": 6, "kv_heads": 2, "width": 80, "slots": 16},
    ],
)
def test_every_body_of_attention_is_the_plain_twin(shape: dict[str, int], dtype: torch.dtype) -> None:
    """Triton's kernel where it is installed; captured in a graph it is the same."""
    q, keys, values, rows = made(1, **shape)
    q, keys, values = (x.to("cuda", dtype) for x in (q, keys, values))
    rows = RowPages(rows.pages.cuda(), rows.visible.cuda())
    want = plain_rows(q, keys, values, rows).float()
    near = 2e-5 if dtype == torch.float32 else 3e-2
    with torch.inference_mode():
        for body in (torch_rows, *([triton_rows] if has_triton() else [])):
            run = partial(body, q, keys, values, rows)
            torch.testing.assert_close(run().float(), want, rtol=0, atol=near)
            replay = CudaRecorder()(run)
            torch.testing.assert_close(replay().float(), want, rtol=0, atol=near)


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
