"""Promises about files: what was tuned is what is loaded, and a run that was killed goes on as if it had not been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from heliostat.build import Loaded, load_modules, module_digest, read_family, verify_module
from heliostat.linear.adapter import digest_adapter, load_adapter, save_adapter
from heliostat.linear.lora import adapter_of
from heliostat.llm import LLM
from heliostat.model.config import read_config
from heliostat.model.weights import (
    checkpoint_facts,
    digest_folder,
    load_transformer,
    read_tensors,
    save_checkpoint,
    state_of,
    weight_files,
)
from heliostat.train.recipe import Recipe
from heliostat.train.tune import Job, tune
from heliostat.train.watch import Silent

PROMPTS = [f"add {a} and {b}" for a in range(3) for b in range(2)]
TUNED = [
    (sharing, tuner)
    for sharing in ("independent", "sun", "prefillshare", "icarus")
    for tuner in ("full", "lora", "paca")
]


def recipe_of(folder: Path, data: Path, sharing: str, tuner: str, **options: object) -> Recipe:
    facts = {
        "family": str(folder),
        "member": "m",
        "sharing": sharing,
        "tuner": tuner,
        "data": (str(data),),
        "max_steps": 4,
        "learning_rate": 0.01,
        "max_length": 128,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
    }
    return Recipe(**{**facts, **options})  # type: ignore[arg-type]


@contextmanager
def tuned(recipe: Recipe) -> Iterator[Job]:
    """Run a recipe; the job, with its modules as they were left in memory."""
    jobs: list[Job] = []

    @contextmanager
    def watching(job: Job) -> Iterator[Silent]:
        jobs.append(job)
        yield Silent()

    tune(recipe, watching=watching)
    yield jobs[0]


# 7. Saved is loaded.


@pytest.mark.parametrize(("sharing", "tuner"), TUNED)
def test_a_member_from_disk_answers_as_it_did_in_memory(
    sharing: str, tuner: str, bare_family: Path, tiny_data: Path
) -> None:
    with tuned(recipe_of(bare_family, tiny_data, sharing, tuner)) as job:
        rows = {"m": job.row}
        memory = LLM.of(job.modules, rows, job.tokenizer).generate(
            PROMPTS, member="m", max_tokens=8, logprobs=0
        )
    disk = LLM(bare_family, dtype="float32").generate(PROMPTS, member="m", max_tokens=8, logprobs=0)
    assert [a.ids for a in disk] == [a.ids for a in memory]
    for one, other in zip(disk, memory, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_digests_survive_saving_loading_and_moving(
    tuner: str, bare_family: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with tuned(recipe_of(bare_family, tiny_data, "sun", tuner)):
        pass
    moved = Path(shutil.copytree(bare_family, tmp_path / "moved"))
    for note in moved.rglob("digest.json"):
        note.unlink()
    family = read_family(moved)
    for name in family.modules:
        assert module_digest(moved, family, name, fresh=True) == family.module(name).digest
    own = load_modules(moved, family, ["base", "m.own"], dtype=torch.float32)["m.own"]
    again = tmp_path / "again"
    if tuner == "full":
        save_checkpoint(
            again, state_of(own.model), json.loads((moved / "modules/m.own/config.json").read_text())
        )
        assert digest_folder(again, weight_files(again), checkpoint_facts(again)) == own.digest
    else:
        save_adapter(again, own.model, "m.own", r=4, alpha=8, base="base")
        assert digest_adapter(again, family.module("base").digest) == own.digest


def test_a_module_whose_files_changed_is_refused(tiny_family: Path) -> None:
    family = read_family(tiny_family)
    folder = tiny_family / family.module("math.own").path
    state = dict(read_tensors(weight_files(folder)))
    state["model.norm.weight"] = state["model.norm.weight"] * 1.001
    save_checkpoint(folder, state, json.loads((folder / "config.json").read_text()))
    with pytest.raises(ValueError, match=r"module 'math.own' changed.*math"):
        verify_module(tiny_family, family, "math.own")
    with pytest.raises(ValueError, match="changed"):
        LLM(tiny_family, members=["math"])


def test_toys_loaded_are_toys_saved(modules: dict[str, Loaded], tiny_base: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_base / "config.json").read_text())
    save_checkpoint(tmp_path / "a", state_of(modules["a"].model), config)
    loaded = load_transformer(tmp_path / "a", read_config(tmp_path / "a"), dtype=torch.float32)
    for name, tensor in state_of(modules["a"].model).items():
        assert torch.equal(state_of(loaded)[name], tensor)
    save_adapter(tmp_path / "la", modules["la"].model, "la", r=4, alpha=8, base="base")
    load_adapter(tmp_path / "la", loaded, "copy")
    for path in (
        f"model.layers.{layer}.{where}" for layer in range(2) for where in ("mlp.up_proj", "self_attn.k_proj")
    ):
        ours, theirs = (adapter_of(m, n)[path] for m, n in ((loaded, "copy"), (modules["la"].model, "la")))
        assert torch.equal(ours.a, theirs.a) and torch.equal(ours.b, theirs.b)
        assert ours.scale == theirs.scale


# 8. The tuned half moved, the frozen half is the same to the bit.


@pytest.mark.parametrize(("sharing", "tuner"), TUNED)
def test_the_own_half_moves_and_the_base_does_not(
    sharing: str, tuner: str, bare_family: Path, tiny_data: Path
) -> None:
    before = dict(read_tensors(weight_files(bare_family / "base")))
    files = {p.name: p.read_bytes() for p in (bare_family / "base").iterdir()}
    with tuned(recipe_of(bare_family, tiny_data, sharing, tuner)) as job:
        if "base" in job.modules:
            for name, tensor in state_of(job.modules["base"].model).items():
                assert torch.equal(tensor, before[name]), name
        used = set() if sharing != "icarus" else {"k_proj", "v_proj"}
        assert not any(part in name for name in job.parameters for part in used)
        assert all(p.requires_grad for p in job.parameters.values())
        trained = {id(p) for p in job.parameters.values()}
        for module in job.modules.values():  # and nothing else asks for a gradient
            assert not any(p.requires_grad for p in module.model.parameters() if id(p) not in trained)
    assert {p.name: p.read_bytes() for p in (bare_family / "base").iterdir()} == files
    family = read_family(bare_family)
    own = dict(read_tensors([next((bare_family / family.module("m.own").path).glob("*.safetensors"))]))
    still = ("k_proj", "v_proj") if sharing == "icarus" else ()
    if tuner != "full":
        assert not any(part in name for name in own for part in still)
        starts_at_zero = {"lora": "lora_B", "paca": "paca_delta"}[tuner]
        moved = {name: bool(t.abs().max() > 0) for name, t in own.items() if starts_at_zero in name}
        silent = (
            ()
            if sharing != "sun"
            else ("layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj", "layers.1.mlp")
        )
        assert moved and all(m or any(part in name for part in silent) for name, m in moved.items())
    else:
        assert own.keys() == before.keys()
        for name, tensor in own.items():
            assert torch.equal(tensor, before[name]) == any(part in name for part in still), name


@pytest.mark.parametrize(("sharing", "tuner"), TUNED)
def test_recomputation_and_bfloat16_learn_the_same(
    sharing: str, tuner: str, bare_family: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Recomputed activations: the same curve. bfloat16: the same within 2 % at every step, and a whole member."""
    curves = {}
    for name, options in {
        "plain": {},
        "again": {"gradient_checkpointing": True},
        "bf16": {"bf16": True},
    }.items():
        folder = Path(shutil.copytree(bare_family, tmp_path / name))
        both = {**options, "logging_steps": 1, "learning_rate": 0.002}
        with tuned(recipe_of(folder, tiny_data, sharing, tuner, **both)):
            curves[name] = [record["loss"] for record in curve(folder)]
        assert LLM(folder, dtype="bfloat16").generate(PROMPTS, member="m", max_tokens=3)
    assert curves["again"] == pytest.approx(curves["plain"], rel=1e-5)
    assert curves["bf16"] == pytest.approx(curves["plain"], rel=0.02)


# 11. Killed is not killed.


def run_python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


KILLED_WHILE_TUNING = """
    import os, signal, sys
    from contextlib import nullcontext
    import torch
    torch.set_num_threads(1)
    from heliostat.train.recipe import Recipe
    from heliostat.train.tune import tune

    class Killer:
        def step(self, record):
            if record["step"] == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)

    recipe = Recipe.model_validate_json(sys.argv[1])
    tune(recipe, watching=lambda job: nullcontext(Killer()))
"""

KILLED_WHILE_SAVING = """
    import os, signal, sys
    from contextlib import nullcontext
    import torch
    torch.set_num_threads(1)
    from heliostat.train import checkpoint
    from heliostat.train.recipe import Recipe
    from heliostat.train.tune import tune
    from heliostat.train.watch import Silent

    whole, calls = checkpoint.save_tensors, []

    def save_half(tensors, path):
        whole(tensors, path)
        calls.append(path)
        if len(calls) == int(sys.argv[2]):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_tensors = save_half
    recipe = Recipe.model_validate_json(sys.argv[1])
    tune(recipe, watching=lambda job: nullcontext(Silent()))
"""


@pytest.mark.parametrize(
    ("script", "when", "sharing", "tuner"),
    [
        (KILLED_WHILE_TUNING, random.Random(11).randrange(3, 12), "sun", "full"),
        (KILLED_WHILE_SAVING, random.Random(12).randrange(3, 9), "icarus", "lora"),
        (KILLED_WHILE_TUNING, random.Random(13).randrange(3, 12), "independent", "paca"),
    ],
    ids=["in a step", "in a checkpoint", "with columns in the weights"],
)
def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(
    script: str, when: int, sharing: str, tuner: str, bare_family: Path, tiny_data: Path, tmp_path: Path
) -> None:
    options: dict[str, object] = {"max_steps": 12, "save_steps": 2, "logging_steps": 1}
    if tuner == "paca":
        options["columns"] = "gradient"
    other = Path(shutil.copytree(bare_family, tmp_path / "undisturbed"))
    recipe = recipe_of(bare_family, tiny_data, sharing, tuner, **options)
    ended = run_python(script, recipe.model_dump_json(), when)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert list((bare_family / "runs" / "m").glob("checkpoint-*"))
    assert "m" not in read_family(bare_family).members
    with tuned(recipe):
        pass
    with tuned(recipe.model_copy(update={"family": str(other)})):
        pass
    assert curve(bare_family) == curve(other)
    assert len(curve(other)) == 12
    one, two = (read_family(f).module("m.own").digest for f in (bare_family, other))
    assert one == two  # every bit of every parameter
    assert not list((bare_family / "runs" / "m").glob("*partial*"))


def curve(folder: Path) -> list[dict[str, float]]:
    """The loss curve on disk, without the clock."""
    lines = (folder / "runs" / "m" / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
