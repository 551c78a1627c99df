"""What ``heliostat bench speculate`` is run on: data of worked answers, a target, a draft of a tenth of its size, a family.

``python -m heliostat.bench.speculate_stand --out out/speculate`` makes it in half an hour on one core: the target is the
embedded base, grown to ten times its size and tuned on the task; the draft is trained from scratch with the same tokenizer;
two members that share the target's decoding are there to see what a judge of one is worth to another. What is there already
is left; a killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from heliostat.bench.grown import grow
from heliostat.build import init_family, read_family
from heliostat.export import export_member, import_draft
from heliostat.files import atomic_write_text
from heliostat.tasks.worked import HELD_OUT, WORKED
from heliostat.train.job import Job
from heliostat.train.pretrain import pretrain
from heliostat.train.pretrain_recipe import PretrainRecipe
from heliostat.train.recipe import Recipe
from heliostat.train.spellings import make_recipe
from heliostat.train.tune import tune
from heliostat.train.watch import Bar

EMBEDDED = Path(__file__).parents[1] / "assets" / "base"
TARGET, DRAFT, FAMILY = "worked", "small", "family"
MEMBERS = {"told": WORKED, "retold": HELD_OUT}
"""Members that share the target's decoding, by what their prompts are."""
LEARNED, PROMPTS, TESTED = 40_000, 400, 200
GROWN = {"width": 384, "layers": 7, "mlp_width": 1152}
"""The target's shape: 12.8 million parameters."""
TUNED: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "max_length": 256,
    "seed": 1,
}
DRAWN: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
    "max_position_embeddings": 512,
    "max_length": 256,
    "per_device_train_batch_size": 8,
    "learning_rate": 4e-3,
    "warmup_ratio": 0.03,
    "decay_ratio": 0.35,
    "seed": 1,
}
"""The draft's shape, the embedded base's own, and schedule."""


def write_data(folder: Path) -> dict[str, Path]:
    """Five files, by what they are for; the same ones every time."""
    sets = {
        "learn": WORKED.train(1, LEARNED),
        "prompts": WORKED.train(2, PROMPTS),
        "test": WORKED.test(0, TESTED),
        "held-out": HELD_OUT.test(0, TESTED),
        **{name: task.train(3, PROMPTS * 10) for name, task in MEMBERS.items()},
    }
    paths = {}
    for name, items in sets.items():
        paths[name] = folder / f"{name}.jsonl"
        if not paths[name].exists():
            atomic_write_text(paths[name], "".join(json.dumps(item) + "\n" for item in items))
    return paths


def _bar(what: str, steps: int) -> Bar:
    return Bar(steps, what=what, as_json=not sys.stderr.isatty())


def make_target(folder: Path, data: Path, steps: int) -> Path:
    """The embedded base, grown, and all of it tuned on worked answers."""
    out, family, grown = folder / "target", folder / "tuning", folder / "grown"
    if out.exists():
        return out
    if not grown.exists():
        grow(EMBEDDED, grown, **GROWN)
    if not family.exists():
        init_family(family, grown)
    if TARGET not in read_family(family).members:
        asked = {"family": str(family), "member": TARGET, "sharing": "independent", "tuner": "full"}
        recipe = make_recipe(Recipe, {**asked, "data": str(data), "max_steps": steps, **TUNED})
        tune(recipe, watching=lambda job: _bar("target", job.steps))
    return export_member(family, TARGET, out)


def make_draft(folder: Path, data: Path, steps: int) -> Path:
    """A model of a tenth of the target, from scratch. (In three times the steps it comes to add up better than that.)"""
    out = folder / "draft"
    if not out.exists():
        wanted = {"output_dir": str(out), "data": str(data), "tokenizer": str(EMBEDDED), "max_steps": steps}
        recipe = make_recipe(PretrainRecipe, {**wanted, **DRAWN})
        pretrain(recipe, watching=lambda settled: _bar("draft", settled.max_steps))
    return out


def _watch(what: str, job: Job) -> Bar:
    return _bar(what, job.steps)


def make_members(family: Path, data: dict[str, Path], steps: int) -> None:
    """Members whose prompts the target's own copy writes, and whose answers the target speaks."""
    for name in MEMBERS:
        if name in read_family(family).members or not steps:
            continue
        asked = {
            "family": str(family),
            "member": name,
            "sharing": "sun",
            "tuner": "full",
            "data": str(data[name]),
        }
        recipe = make_recipe(Recipe, {**asked, **TUNED, "max_steps": steps, "learning_rate": 3e-4})
        tune(recipe, watching=partial(_watch, name))


def make_stand(
    folder: Path,
    *,
    target: Path | None = None,
    draft: Path | None = None,
    steps: Sequence[int] = (1100, 500, 60),
) -> Path:
    """The family, with everything that is not given made; ``steps``: of target, draft and members."""
    folder.mkdir(parents=True, exist_ok=True)
    data = write_data(folder)
    target = target or make_target(folder, data["learn"], steps[0])
    draft = draft or make_draft(folder, data["learn"], steps[1])
    family = folder / FAMILY
    if not family.exists():
        init_family(family, target)
    if DRAFT not in read_family(family).modules:
        import_draft(family, DRAFT, draft)
    make_members(family, data, steps[2])
    return family


def main() -> None:
    """Make it, and say what to type next."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/speculate"))
    parser.add_argument("--target", type=Path, help="a checkpoint in place of the tuned embedded base")
    parser.add_argument("--draft", type=Path, help="a checkpoint with the target's tokenizer that drafts")
    parser.add_argument("--steps", default="1100,500,60", help="of target, draft and members")
    given = parser.parse_args()
    steps = [int(part) for part in given.steps.split(",")]
    family = make_stand(given.out, target=given.target, draft=given.draft, steps=steps)
    data = f"--prompts {given.out}/prompts.jsonl --test {given.out}/test.jsonl --held-out {given.out}/held-out.jsonl"
    members = ",".join(f"{name}={given.out}/{name}.jsonl" for name in read_family(family).members)
    own = f" --members {members}" if members else ""
    print(f"next:\n  heliostat bench speculate {family} --draft {DRAFT} {data}{own}")


if __name__ == "__main__":
    main()
