"""Runs at 25 million parameters, of every sharing and tuner: each trains, in the memory that the dry run said."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from heliostat.family import SHARINGS

pytestmark = pytest.mark.slow

SHAPE = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1536,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
}
# The peak of a process of its own: what this one holds must not count.
PROGRAM = """
import json, sys
from contextlib import nullcontext
from heliostat.train.forecast import forecast
from heliostat.train.recipe import Recipe
from heliostat.train.spellings import make_recipe
from heliostat.train.tune import tune
from heliostat.train.watch import Silent
recipe = make_recipe(Recipe, json.loads(sys.argv[1]))
if sys.argv[2] == "said":
    print(forecast(recipe).memory)
else:
    tune(recipe, watching=lambda job: nullcontext(Silent()))
    print(1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]))
"""


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("sharing", list(SHARINGS))
def test_memory_is_within_15_percent_of_what_the_dry_run_said(
    make_checkpoint: Callable[..., Path], tmp_path: Path, sharing: str, tuner: str
) -> None:
    from heliostat.build import init_family, read_family

    family = tmp_path / "fam"
    init_family(family, make_checkpoint(**SHAPE))
    assert read_family(family).module("base").parameters > 24e6
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"say {i} times hello " * 4, "completion": f"hello {i} " * 6} for i in range(200)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "family": str(family),
        "member": "big",
        "sharing": sharing,
        "tuner": tuner,
        "data": [str(data)],
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "max_length": 256,
    }
    said, took = (_run(recipe, what) for what in ("said", "took"))
    assert said == pytest.approx(took, rel=0.15), f"said {said / 2**20:.0f} MiB, took {took / 2**20:.0f} MiB"


def _run(recipe: dict[str, object], what: str) -> int:
    words = [sys.executable, "-c", PROGRAM, json.dumps(recipe), what]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
