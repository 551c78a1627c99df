"""Two real processes that pretrain together move alpha's average as one process does that sees all rows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heliostat.model.weights import read_tensors

pytestmark = pytest.mark.slow

WORKER = """
import sys
import torch
import torch.distributed as dist
from heliostat.model.alpha import settle
from heliostat.model.config import parse_config
from heliostat.model.seam import Causal
from heliostat.model.transformer import Transformer
from heliostat.model.weights import save_tensors, state_of
from heliostat.train.ranks import ALONE, Ranks

file, number, count, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
ranks = ALONE
if count > 1:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=count)
    ranks = Ranks(number, count)
torch.manual_seed(0)
shape = {"model_type": "heliostat_llama", "attention": {"kind": "affine"}, "vocab_size": 61, "hidden_size": 32,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
         "max_position_embeddings": 64}
model = Transformer(parse_config(shape))
for parameter in model.parameters():
    if parameter.dim() > 1:
        torch.nn.init.normal_(parameter, std=0.4)
for step in range(3):
    rows = torch.randint(0, 61, (5, 9), generator=torch.Generator().manual_seed(step))
    own = rows[number::count]
    model(own, torch.arange(9).expand_as(own), Causal()).sum().backward()
    settle(model, ranks.summed)
save_tensors({n: t for n, t in state_of(model).items() if n.endswith("alpha_ma")}, out)
if count > 1:
    dist.destroy_process_group()
"""


def test_two_processes_are_one(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    def run(count: int) -> list[dict[str, torch.Tensor]]:
        outs = [tmp_path / f"{count}-{number}.safetensors" for number in range(count)]
        started = [
            subprocess.Popen(
                [
                    sys.executable,
                    str(script),
                    str(tmp_path / f"meet-{count}"),
                    str(number),
                    str(count),
                    str(out),
                ],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for number, out in enumerate(outs)
        ]
        assert [process.wait(timeout=120) for process in started] == [0] * count
        return [dict(read_tensors([out])) for out in outs]

    (whole,), (one, two) = run(1), run(2)
    assert whole.keys() == one.keys() == two.keys() and len(whole) == 2
    for name, average in whole.items():
        assert torch.equal(one[name], two[name]) and average.min() > 0
        torch.testing.assert_close(one[name], average, rtol=1e-6, atol=1e-7)
