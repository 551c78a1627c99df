"""Several processes train one member: two on half a batch each do what one does on the whole, and write once."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from heliostat.build import RUNS, load_modules, read_family
from heliostat.errors import Refused
from heliostat.family import SHARINGS
from heliostat.linear.lora import parts_of
from heliostat.model.weights import state_of
from heliostat.train import checkpoint, ranks
from heliostat.train.forecast import forecast
from heliostat.train.ranks import ALONE, Ranks
from heliostat.train.recipe import Recipe
from heliostat.train.tune import tune
from heliostat.train.watch import Silent

WORKER = """
import json, sys
from contextlib import nullcontext
from heliostat.train import ranks
from heliostat.train.recipe import Recipe
from heliostat.train.tune import tune

class Stops:
    def __init__(self, at): self.at = at
    def step(self, record):
        if record["step"] == self.at:
            raise KeyboardInterrupt

for values in json.loads(sys.argv[1]):
    stop = values.pop("stop", None)
    recipe, together = ranks.joined(Recipe(**values)) if "together" not in dir() else (Recipe(**values), together)
    from dataclasses import replace
    together = replace(together, sharded=recipe.data_parallel == "fsdp")
    try:
        tune(recipe, watching=lambda job: nullcontext(Stops(stop)), ranks=together)
    except KeyboardInterrupt:
        break
ranks.left()
"""
DROPS = {"dropbp": 0.5, "dropbp_rates": "uniform", "gradient_checkpointing": True}
FEW = [("sun", "full", "fsdp", DROPS), ("icarus", "paca", "fsdp", {}), ("prefillshare", "lora", "ddp", {})]
ALL = [
    (sharing, tuner, way, options)
    for sharing in SHARINGS
    for tuner, way, options in (
        ("full", "fsdp", {}),
        ("full", "ddp", DROPS),
        ("lora", "fsdp", DROPS),
        ("paca", "fsdp", {}),
    )
]


def values(folder: Path, data: Path, member: str, count: int, **options: Any) -> dict[str, Any]:
    facts = {"family": str(folder), "member": member, "data": [str(data)], "max_length": 128, "bf16": False}
    pace = {"max_steps": 4, "learning_rate": 0.02, "logging_steps": 1, "adam_epsilon": 1e-4}
    return {**facts, **pace, "per_device_train_batch_size": 14 // count, **options}


def run(
    count: int, folder: Path, recipes: Sequence[Mapping[str, Any]], *, before: str = ""
) -> list[subprocess.CompletedProcess[str]]:
    """The recipes, one after the other, in so many processes that meet through a file and run ``before`` first."""
    meeting = folder / f"meeting-{count}-{len(list(folder.glob('meeting*')))}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", before + WORKER, json.dumps(list(recipes))],
            env={
                **os.environ,
                "RANK": str(number),
                "WORLD_SIZE": str(count),
                ranks.MEETING: str(meeting),
                "GLOO_SOCKET_IFNAME": "lo",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    said = [p.communicate(timeout=240) for p in started]
    return [subprocess.CompletedProcess(p.args, p.returncode, *s) for p, s in zip(started, said, strict=True)]


def weights(folder: Path, member: str) -> dict[str, torch.Tensor]:
    name = f"{member}.own"
    loaded = load_modules(folder, read_family(folder), [name], dtype=torch.float32)[name]
    if loaded.adapter is None:
        return state_of(loaded.model)
    parts = parts_of(loaded.model, loaded.adapter)
    return {f"{path}.{n}": t for path, part in parts.items() for n, t in part.state_dict().items()}


def history(folder: Path, member: str) -> list[dict[str, Any]]:
    lines = (folder / RUNS / member / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("ways", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
def test_two_processes_do_what_one_does_with_twice_the_batch(
    bare_family: Path, tiny_data: Path, ways: list[tuple[str, str, str, dict[str, Any]]]
) -> None:
    """24 examples in batches of 14: the last batch of an epoch is smaller than the others."""
    both: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for count, recipes in both.items():
        for sharing, tuner, way, options in ways:
            member, more = f"{sharing}-{tuner}-{way}-{count}", {"data_parallel": way, **options}
            recipes.append(
                values(bare_family, tiny_data, member, count, sharing=sharing, tuner=tuner, **more)
            )
    for one in both[1]:
        tune(Recipe(**one), watching=lambda job: nullcontext(Silent()))
    for done in run(2, bare_family, both[2]):
        assert done.returncode == 0, done.stderr[-2000:]
    for sharing, tuner, way, _ in ways:
        names = [f"{sharing}-{tuner}-{way}-{count}" for count in (1, 2)]
        one_log, two_log = (history(bare_family, name) for name in names)
        assert [r["step"] for r in one_log] == [r["step"] for r in two_log] == [1, 2, 3, 4]
        assert [r["tokens"] for r in one_log] == [r["tokens"] for r in two_log]
        for key in ("loss", "grad_norm"):
            assert [r[key] for r in two_log] == pytest.approx([r[key] for r in one_log], rel=2e-3), names
        alone, together = (weights(bare_family, name) for name in names)
        assert set(alone) == set(together)
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, rtol=2e-3, atol=2e-4, msg=name)


OTHERWISE = """
import os
from heliostat.linear import choice
if os.environ["RANK"] == "1":
    choice._best = lambda scores, r: (-scores.cpu()).topk(r).indices.sort().values
"""


@pytest.mark.slow
def test_the_first_process_chooses_the_columns_for_all(bare_family: Path, tiny_data: Path) -> None:
    """The second one would choose the very opposite: it does not come to that."""
    options = {"sharing": "independent", "tuner": "paca", "columns": "norm", "data_parallel": "ddp", "r": 4}
    for count, before in ((1, ""), (2, OTHERWISE)):
        recipe = values(bare_family, tiny_data, f"chosen-{count}", count, **options)
        for done in run(count, bare_family, [recipe], before=before):
            assert done.returncode == 0, done.stderr[-2000:]
    alone, together = (weights(bare_family, f"chosen-{count}") for count in (1, 2))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.slow
def test_an_interrupted_run_of_two_goes_on_from_one_whole_checkpoint(
    bare_family: Path, tiny_data: Path
) -> None:
    options = {"sharing": "sun", "tuner": "full", "save_steps": 1}
    straight = values(bare_family, tiny_data, "straight", 2, **options)
    for done in run(2, bare_family, [straight]):
        assert done.returncode == 0, done.stderr[-2000:]
    broken = values(bare_family, tiny_data, "broken", 2, **options)
    # The first one dies in its third step; the other one waits in vain and is ended by the death of the connection.
    ended = run(2, bare_family, [{**broken, "stop": 3}])
    folder = bare_family / RUNS / "broken"
    (*_, newest) = checkpoint.checkpoints(folder)
    assert newest.name.endswith("2") and not list(folder.glob("*.partial*"))
    shapes = {n: t.shape for n, t in weights(bare_family, "straight").items()}
    from heliostat.model.weights import read_tensors

    saved = dict(read_tensors([newest / checkpoint.PARAMETERS]))
    assert {n: t.shape for n, t in saved.items()} == shapes  # whole tensors, not parts
    for done_again in run(2, bare_family, [broken]):
        assert done_again.returncode == 0, done_again.stderr[-2000:]
    wanted, found = weights(bare_family, "straight"), weights(bare_family, "broken")
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert len(ended) == 2


def test_one_process_is_no_special_case() -> None:
    assert ALONE.alone and ALONE.first and ALONE.weight == 1
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    assert ALONE.total(2.5) == 2.5 and ALONE.agree(True) and not ALONE.agree(False)
    ALONE.wait()


def test_a_batch_is_dealt_out_without_loss() -> None:
    shares = [Ranks(number, 3).share(range(7)) for number in range(3)]
    assert sorted(x for share in shares for x in share) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_wrong_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(Refused, match="WORLD_SIZE is 'two'"):
        ranks.wanted()


def test_the_forecast_is_of_one_process(bare_family: Path, tiny_data: Path) -> None:
    facts: dict[str, Any] = {
        "family": str(bare_family),
        "member": "m",
        "sharing": "sun",
        "data": str(tiny_data),
    }
    recipe = Recipe(**facts, max_length=128, bf16=False)
    one, two = forecast(recipe), forecast(recipe, processes=2)
    assert two.optimizer == one.optimizer // 2 and two.trainable == one.trainable
    assert two.steps == -(-one.examples // 16)
    whole = forecast(recipe.model_copy(update={"data_parallel": "ddp"}), processes=2)
    assert whole.optimizer == one.optimizer and whole.weights == one.weights
    assert "memory of each of 2 processes" in dict(two.rows())
