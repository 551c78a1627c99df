"""One measured run: tune one row on one embedded task, answer the test set, keep every verdict.

``python -m heliostat.bench.trial --help`` runs one in a process of its own; ``results`` runs many, ``demo`` a few.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from heliostat.bench.methods import RANK
from heliostat.build import init_family, load_modules, read_family
from heliostat.family import SHARINGS, Row
from heliostat.files import atomic_write_text, read_json
from heliostat.tasks import TASKS
from heliostat.train.recipe import Recipe
from heliostat.train.spellings import make_recipe

EMBEDDED_BASE = Path(__file__).parent.parent / "assets" / "base"

ANSWER_TOKENS = 96
"""Where an answer is cut: twice the longest reference of any embedded task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is run; two equal trials give equal results."""

    task: str
    sharing: str
    tuner: str
    learning_rate: float
    seed: int
    steps: int
    batch: int = 32
    r: int = RANK
    columns: str = "random"
    dropbp: float = 0.0
    dropbp_rates: str = "sensitivity"
    frozen: str = ""
    """Module in the base's place, where it is another; see ``ensure_quantized``."""
    train_items: int = 10_000
    test_items: int = 1_000
    validation_items: int = 300

    @property
    def name(self) -> str:
        """Name of the member it makes."""
        rate = f"{self.learning_rate:g}"
        rank = f"-r{self.r}" if self.tuner != "full" and self.r != RANK else ""
        columns = f"-{self.columns}" if self.columns != "random" else ""
        dropped = f"-dropbp{self.dropbp:g}-{self.dropbp_rates}" if self.dropbp else ""
        on = f"-on-{self.frozen}" if self.frozen else ""
        more = f"{rank}{columns}{dropped}{on}"
        return f"{self.task}-{self.sharing}-{self.tuner}-{rate}-s{self.seed}-{self.steps}{more}"


def run(
    trial: Trial, folder: Path, *, watching: Callable[[Any], AbstractContextManager[Any]] | None = None
) -> dict[str, Any]:
    """Tune and judge; the result is kept in ``folder`` and a finished trial is not run again."""
    kept = kept_at(folder, trial)
    if kept.exists():
        return read_json(kept)
    from heliostat.train.tune import tune
    from heliostat.train.watch import Silent

    begin = time.perf_counter()
    files = write_data(trial, folder)
    if trial.name not in read_family(folder / "family").members:
        tune(
            recipe_of(trial, folder, files["train"]), watching=watching or (lambda job: nullcontext(Silent()))
        )
    seconds = time.perf_counter() - begin
    row = read_family(folder / "family").row(trial.name)
    result = {"trial": asdict(trial), "seconds": round(seconds, 2), **judge(trial, row, folder)}
    result["history"] = _history(folder, trial)
    kept.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(kept, json.dumps(result) + "\n")
    return result


def kept_at(folder: Path, trial: Trial, half: str | None = None) -> Path:
    """Where a result lies: of a trial, of its module as another sharing's ``half``, or of the ``base``."""
    name = {None: trial.name, "base": f"{trial.task}-base"}.get(half, f"{trial.name}.as-{half}")
    return folder / "trials" / f"{name}.json"


def recipe_of(trial: Trial, folder: Path, data: Path) -> Recipe:
    """The recipe that a trial stands for."""
    values: dict[str, Any] = {
        "family": str(folder / "family"),
        "member": trial.name,
        "sharing": trial.sharing,
        "data": [str(data)],
        "tuner": trial.tuner,
        "learning_rate": trial.learning_rate,
        "max_steps": trial.steps,
        "per_device_train_batch_size": trial.batch,
        "max_length": 256,
        "seed": trial.seed,
        "dropbp": trial.dropbp,
        "dropbp_rates": trial.dropbp_rates,
    }
    values |= replacing(trial.sharing, trial.frozen)
    if trial.tuner != "full":
        values["r"] = trial.r
    if trial.tuner == "paca":
        values["columns"] = trial.columns
    return make_recipe(Recipe, values)


def replacing(sharing: str, frozen: str) -> dict[str, str]:
    """The option of a recipe that puts ``frozen`` in the base's place, by its value; nothing where it is none."""
    return dict.fromkeys(SHARINGS[sharing].frozen, frozen) if frozen else {}


def judge(trial: Trial, row: Row, folder: Path) -> dict[str, Any]:
    """Accuracy on the validation and test sets of a trial's task, under any row over the family's modules."""
    from heliostat.build import best_dtype, load_tokenizer
    from heliostat.llm import LLM
    from heliostat.train.evaluate import evaluate

    family_folder, files = folder / "family", write_data(trial, folder)
    family = read_family(family_folder)
    modules = load_modules(family_folder, family, row.modules, dtype=best_dtype(), joined=True)
    llm = LLM.of(modules, {"judged": row}, load_tokenizer(family_folder, family), max_running=128)
    metric = TASKS[trial.task].metric
    found = {
        part: evaluate(llm, "judged", files[part], metric=metric, max_tokens=ANSWER_TOKENS)
        for part in ("validation", "test")
    }
    samples = [asdict(item) for item in found["test"].items[:6]]
    return {
        "validation": found["validation"].accuracy,
        "test": found["test"].accuracy,
        "verdicts": "".join("1" if item.right else "0" for item in found["test"].items),
        "samples": samples,
    }


def as_half(ordinary: Trial, half: str, folder: Path) -> dict[str, Any]:
    """A tuned module used, untrained for it, as the own half of another row: an ordinary one is the negative control.

    ``half``: a sharing (``sun``), one with another module in the base's place (``sun@base-2bit``), or
    ``quantized@m1v4g128``: the tuned module itself in codebooks, alone.
    """
    kept = kept_at(folder, ordinary, half)
    if kept.exists():
        return read_json(kept)
    family = read_family(folder / "family")
    (own,) = family.own_modules(ordinary.name)
    sharing, _, other = half.partition("@")
    if sharing == QUANTIZED:
        name = f"{ordinary.name}-{other}"
        ensure_quantized(folder, name, other, module=own)
        row = Row(name, name, name, name)
    else:
        found = SHARINGS[sharing]
        row = found.instantiate(own, found.replaced(**replacing(sharing, other)))
    result = {"trial": asdict(ordinary), "as": half, **judge(ordinary, row, folder)}
    atomic_write_text(kept, json.dumps(result) + "\n")
    return result


QUANTIZED = "quantized"
CALIBRATION = 4_000
"""Documents of the pretraining corpus (of no task) that modules are fitted on; of another seed than the base's."""


def ensure_quantized(folder: Path, name: str, format: str, *, module: str = "base") -> None:
    """A module of the trials' family in codebooks, made the first time with the settings of the command line."""
    from heliostat.quantize.run import Wish, quantize
    from heliostat.tasks.corpus import documents, rendered

    if name in read_family(folder / "family").modules:
        return
    data = folder / "data" / "calibration.jsonl"
    if not data.exists():
        data.parent.mkdir(parents=True, exist_ok=True)
        texts = (rendered(document).removesuffix("<|end|>") for document in documents(5, CALIBRATION))
        atomic_write_text(data, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    quantize(Wish(family=str(folder / "family"), name=name, format=format, data=str(data), module=module))


def base_alone(trial: Trial, folder: Path) -> dict[str, Any]:
    """The untuned base on the trial's task."""
    kept = kept_at(folder, trial, "base")
    if kept.exists():
        return read_json(kept)
    result = {"trial": asdict(trial), **judge(trial, Row("base", "base", "base", "base"), folder)}
    kept.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(kept, json.dumps(result) + "\n")
    return result


def write_data(trial: Trial, folder: Path) -> Mapping[str, Path]:
    """The task's train, validation and test files. Test items are the same for every seed; none is in training."""
    task, kept_apart = TASKS[trial.task], trial.test_items
    held_out = task.test(7, trial.test_items + trial.validation_items)
    sets = {
        "train": (
            f"train-{trial.train_items}-s{trial.seed}",
            lambda: task.train(1000 + trial.seed, trial.train_items),
        ),
        "validation": (f"validation-{trial.validation_items}", lambda: held_out[kept_apart:]),
        "test": (f"test-{trial.test_items}", lambda: held_out[:kept_apart]),
    }
    files = {}
    for part, (name, make) in sets.items():
        files[part] = folder / "data" / f"{trial.task}-{name}.jsonl"
        if not files[part].exists():
            files[part].parent.mkdir(parents=True, exist_ok=True)
            atomic_write_text(files[part], "".join(json.dumps(item) + "\n" for item in make()))
    return files


def ensure_family(folder: Path, base: Path = EMBEDDED_BASE) -> None:
    """The family that trials are run in, made around the embedded base the first time."""
    if not (folder / "family" / "family.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        init_family(folder / "family", base)


def _history(folder: Path, trial: Trial) -> list[list[float]]:
    log = folder / "family" / "runs" / trial.name / "log.jsonl"
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [[r["step"], round(r["loss"], 5)] for r in records]


def main() -> None:
    """Run one trial from the command line; what is printed is its result."""
    import argparse

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    for name, kind in (
        ("task", str),
        ("sharing", str),
        ("tuner", str),
        ("learning-rate", float),
        ("seed", int),
        ("steps", int),
    ):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--frozen", default="", help="a module of the family in the base's place")
    usual = {field.name: field.default for field in fields(Trial)}
    for name, kind in (
        ("r", int),
        ("columns", str),
        ("dropbp-rates", str),
        ("dropbp", float),
        ("batch", int),
        ("train-items", int),
        ("test-items", int),
        ("validation-items", int),
    ):
        parser.add_argument(f"--{name}", type=kind, default=usual[name.replace("-", "_")])
    parser.add_argument(
        "--as", dest="half", help="judge the tuned module untrained in this row (see as_half); base: the base"
    )
    given = vars(parser.parse_args())
    folder, threads, half = given.pop("folder"), given.pop("threads"), given.pop("half")
    import torch

    torch.set_num_threads(threads)
    trial = Trial(**given)
    if half is None:
        result = run(trial, folder)
    else:
        result = base_alone(trial, folder) if half == "base" else as_half(trial, half, folder)
    print(json.dumps({"name": trial.name, "validation": result["validation"], "test": result["test"]}))


if __name__ == "__main__":
    main()
