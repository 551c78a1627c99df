"""The main job in three minutes: one task, every sharing and its negative control, from the embedded base, live.

Interrupted, it goes on where it was: members, trained steps and verdicts are kept in the output folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from heliostat.bench.methods import METHODS, RANK, Method
from heliostat.bench.report import write_demo_report
from heliostat.bench.trial import EMBEDDED_BASE, Trial, as_half, base_alone, ensure_family, run
from heliostat.build import config_of, read_family
from heliostat.errors import Refused
from heliostat.family import BASE, SHARINGS, Family, Member, Module, choose
from heliostat.files import atomic_write_text, readable_size
from heliostat.model.config import ModelConfig, adapter_parameters
from heliostat.survey import savings
from heliostat.tasks import TASKS
from heliostat.train.recipe import TARGETS

STEPS = 240
ITEMS = 500
"""Held-out prompts that are answered and graded."""
MEMBERS = 4
"""Members of the family whose memory is counted."""
PROMPT = 200
"""Tokens of the prompt whose keys and values are counted."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table."""

    name: str
    accuracy: float | None
    seconds: float | None
    note: str


def trials(task: str, steps: int, items: int = ITEMS) -> dict[str, Trial]:
    """The demo's runs by name."""
    options = {
        "task": task,
        "seed": 0,
        "steps": steps,
        "train_items": min(8_000, 32 * steps),
        "test_items": items,
        "validation_items": 1,
    }
    return {
        m.label: Trial(sharing=m.sharing, tuner=m.tuner, learning_rate=m.demo_rate, **options)  # type: ignore[arg-type]
        for m in METHODS
    }


def main(
    *,
    out: Path,
    task: str = "tools",
    steps: int = STEPS,
    as_json: bool = False,
    items: int = ITEMS,
    base: Path = EMBEDDED_BASE,
) -> dict[str, Any]:
    """Run the demo in ``out``; returns its results, which also lie in ``out/results.json`` and ``out/report.html``.

    ``items``: held-out prompts that are answered and graded.
    """
    out = Path(out)
    choose(task, TASKS, what="task")
    if not (base / "model.safetensors").is_file():
        raise Refused(f"the embedded base is missing ({base}); make it: make base")
    _refuse_other_run(out, task, steps)
    ensure_family(out, base)
    console = Console(stderr=True, quiet=as_json)
    begin, lines, found = time.perf_counter(), [], {}
    planned = trials(task, steps, items)
    for line, name, result in _work(planned, out, console):
        lines.append(line)
        found[name] = result
        console.print(_table(lines, task))
    results = _results(out, task, steps, planned, lines, found, seconds=time.perf_counter() - begin)
    atomic_write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    report = write_demo_report(out / "report.html", results)
    console.print(_memory_table(results["memory"]))
    console.print(
        f"picture: {report}\nthe family: {out / 'family'}   try: heliostat inspect {out / 'family'}"
    )
    return results


def _work(
    planned: Mapping[str, Trial], out: Path, console: Console
) -> Iterator[tuple[Line, str, dict[str, Any]]]:
    """Every line of the table as soon as it is known."""
    first = next(iter(planned.values()))
    result = base_alone(first, out)
    yield Line("base, untuned", result["test"], None, "the start"), "base", result
    for name, trial in planned.items():
        result = run(trial, out, watching=_watching(console))
        shared = SHARINGS[trial.sharing].shared
        yield Line(name, result["test"], result["seconds"], f"shared: {shared}"), name, result
    for sharing, part in (("sun", "writer"), ("prefillshare", "speaker")):
        result = as_half(first, sharing, out)
        name = f"control: full fine-tune as {sharing}'s {part}"
        yield Line(name, result["test"], None, "not trained for it"), name, result


def _watching(console: Console) -> Callable[[Any], Any]:
    from heliostat.train.watch import Bar, Silent

    @contextmanager
    def watching(job: Any) -> Iterator[Any]:
        if console.quiet:
            yield Silent()
            return
        with Bar(job.steps, what=f"{job.recipe.sharing}, {job.recipe.tuner}") as bar:
            yield bar

    return watching


def _refuse_other_run(out: Path, task: str, steps: int) -> None:
    """One folder, one demo: another task or length would mix its results."""
    note = out / "demo.json"
    asked = {"task": task, "steps": steps}
    if note.exists():
        held = json.loads(note.read_text(encoding="utf-8"))
        if held != asked:
            raise Refused(f"{out} holds a demo of {held}; choose another --out, or remove it")
        return
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(note, json.dumps(asked))


def _results(
    out: Path,
    task: str,
    steps: int,
    planned: Mapping[str, Trial],
    lines: Sequence[Line],
    found: Mapping[str, Mapping[str, Any]],
    *,
    seconds: float,
) -> dict[str, Any]:
    from heliostat.bench.birth import certificate

    family = read_family(out / "family")
    config = config_of(out / "family", family)
    return {
        "birth": certificate(f"heliostat demo --task {task} --steps {steps}"),
        "task": {"name": task, "what": TASKS[task].what, "metric": TASKS[task].metric},
        "seconds": round(seconds, 1),
        "lines": [asdict(line) for line in lines],
        "histories": {name: found[name]["history"] for name in planned},
        "samples": {name: result["samples"] for name, result in found.items()},
        "memory": memory(config),
        "family": {name: m.sharing for name, m in family.members.items()},
    }


def memory(config: ModelConfig) -> dict[str, dict[str, float]]:
    """Bytes (bfloat16) of the weights of MEMBERS members tuned by each method, and of one prompt's K,V."""
    size = 2
    found: dict[str, dict[str, float]] = {}
    prompt = PROMPT * config.kv_values_per_token * size
    for method in METHODS:
        family = _imagined(config, method)
        weights, *_, copies = savings(family, size=size, prompt=prompt, tokens=PROMPT)
        found[f"{MEMBERS} x {method.label}"] = {"weights": weights.family, "kv": copies.family}
    return found


def _imagined(config: ModelConfig, method: Method) -> Family:
    """A family of MEMBERS members, all of one method, whose sizes can be counted."""
    modules = {BASE: Module(BASE, BASE, "", parameters=config.parameters)}
    members = {}
    for number in range(MEMBERS):
        name, own = f"member-{number}", f"own-{number}"
        adapter = method.tuner == "lora"
        size = (
            adapter_parameters(config, RANK, TARGETS[SHARINGS[method.sharing].targets])
            if adapter
            else config.parameters
        )
        modules[own] = Module(own, own, "", base=BASE if adapter else None, parameters=size)
        members[name] = Member(name, SHARINGS[method.sharing].instantiate(own), method.sharing)
    return Family(modules, members)


def _table(lines: Sequence[Line], task: str) -> Table:
    table = Table(title=f"{task}: {TASKS[task].what}")
    for head in ("", "right answers", "seconds", ""):
        table.add_column(head, justify="right" if head in ("right answers", "seconds") else "left")
    for line in lines:
        accuracy = "" if line.accuracy is None else f"{line.accuracy:.1%}"
        table.add_row(line.name, accuracy, "" if line.seconds is None else f"{line.seconds:.0f}", line.note)
    return table


def _memory_table(memory: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(
        title=f"memory of {MEMBERS} members: weights, and the keys and values of one prompt of {PROMPT} tokens"
    )
    for head in ("", "weights", "K,V"):
        table.add_column(head, justify="right" if head else "left")
    for name, sizes in memory.items():
        table.add_row(name, readable_size(sizes["weights"]), readable_size(sizes["kv"]))
    return table
