"""``heliostat train`` and ``pretrain``: a recipe from a file and flags, the run, and what it came to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from heliostat.cli.failing import stop
from heliostat.cli.options import fields_of, given, recipe_options, taking
from heliostat.cli.printing import Json, note, percent, print_json, print_next, print_samples, print_table
from heliostat.cli.together import start, started
from heliostat.errors import Refused
from heliostat.train.pretrain_recipe import PretrainRecipe
from heliostat.train.recipe import Pace, Recipe
from heliostat.train.spellings import make_recipe, read_values

if TYPE_CHECKING:
    from heliostat.train.pretrain import Pretrained
    from heliostat.train.tune import Job, Outcome
    from heliostat.train.watch import Bar

P = TypeVar("P", bound=Pace)
SAMPLES = 3
YAML = (".yaml", ".yml")

Target = Annotated[
    Path | None,
    typer.Argument(metavar="FAM|RECIPE.yaml", help="A family's folder, or a recipe; options override it."),
]
RecipeFile = Annotated[
    Path | None,
    typer.Argument(metavar="RECIPE.yaml", help="A recipe; options override it.", show_default=False),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say parameters, memory and time, and train nothing.")
]
Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        help="Train in so many processes on this machine, each with a batch of its own (see --data-parallel); "
        "over several machines: torchrun.",
    ),
]


@taking(recipe_options(Recipe))
def train(
    target: Target = None,
    dry_run: DryRun = False,
    processes: Processes = 1,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Interrupted or killed, the same command goes on. Recipe, log and loss curve lie in FAM/runs/MEMBER."""
    recipe = recipe_of(Recipe, target, given(flags), folder="family")
    if dry_run:
        return _forecast(recipe, max(processes, started()), as_json=as_json)
    if processes != 1 and started() == 1:
        raise typer.Exit(start(processes))
    from heliostat.train import ranks
    from heliostat.train.loop import Interrupted
    from heliostat.train.tune import tune
    from heliostat.train.watch import Bar

    onlooker = Onlooker(
        lambda job: (
            _announced(job),
            Bar(job.steps, what=job.recipe.member, as_json=as_json, every=job.recipe.logging_steps),
        )[1]
    )
    recipe, together = ranks.joined(recipe)
    try:
        outcome = tune(recipe, watching=onlooker, echo=note, ranks=together)
    except Interrupted as error:
        stop(f"{error}; the same command goes on from there")
    finally:
        ranks.left()
    if not together.first:
        return
    try:
        facts = _facts(recipe, outcome, onlooker)
    except KeyboardInterrupt:
        stop(f"stopped: {recipe.member} is saved in {recipe.family}, its answers were not graded")
    if as_json:
        return print_json(facts)
    _show(recipe, outcome, facts)


@taking(recipe_options(PretrainRecipe))
def pretrain(
    recipe_file: RecipeFile = None, processes: Processes = 1, as_json: Json = False, **flags: Any
) -> None:
    """Text becomes a tokenizer and a checkpoint. Interrupted or killed, the same command goes on."""
    recipe = recipe_of(PretrainRecipe, recipe_file, given(flags), folder="output_dir")
    if processes != 1 and started() == 1:
        raise typer.Exit(start(processes))
    from heliostat.train import ranks
    from heliostat.train.loop import Interrupted
    from heliostat.train.pretrain import pretrain as run
    from heliostat.train.watch import Bar

    onlooker = Onlooker(
        lambda settled: Bar(
            settled.max_steps, what="pretraining", as_json=as_json, every=settled.logging_steps
        )
    )
    recipe, together = ranks.joined(recipe)
    try:
        made = run(recipe, watching=onlooker, echo=note, ranks=together)
    except Interrupted as error:
        stop(f"{error}; the same command goes on from there")
    finally:
        ranks.left()
    if together.first:
        _show_pretrained(made, onlooker, as_json=as_json)


def recipe_of(kind: type[P], target: Path | None, flags: Mapping[str, Any], *, folder: str) -> P:
    """The recipe that a file or a folder and flags make together; ``folder`` is the field a folder fills."""
    values: dict[str, Any] = {}
    from_file = target is not None and (target.suffix in YAML or target.is_file())
    if target is not None and from_file:
        values = read_values(target)
    elif target is not None:
        values = {folder: str(target)}
    overridden = fields_of(kind, flags)
    kept = {word: value for word, value in values.items() if not fields_of(kind, [word]) & overridden}
    return make_recipe(kind, kept | dict(flags), where=str(target) if from_file else "flags", tell=note)


class Onlooker:
    """Makes the bar once the job is known, and counts seconds and tokens beside it."""

    def __init__(self, make_bar: Callable[[Any], Bar]) -> None:
        self._make_bar = make_bar
        self._bar: Bar | None = None
        self.first = self.tokens = 0
        """First step of this session (1-based; 0: none was taken), and tokens through modules since then."""
        self.seconds = 0.0

    def __call__(self, job: Any) -> AbstractContextManager[Onlooker]:
        self._bar = self._make_bar(job)
        return self

    def __enter__(self) -> Onlooker:
        assert self._bar is not None
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._bar is not None
        self._bar.__exit__(*error)

    def step(self, record: Mapping[str, Any]) -> None:
        """See one step."""
        assert self._bar is not None
        if not self.first:
            self.first = record["step"]
            if self.first > 1:
                note(f"going on after step {self.first - 1}")
        self.tokens += record["tokens"]
        self.seconds += record["seconds"]
        self._bar.step(record)

    @property
    def facts(self) -> dict[str, Any]:
        """Speed of this session."""
        speed = self.tokens / self.seconds if self.seconds else 0.0
        return {"seconds": round(self.seconds, 2), "tokens_per_second": round(speed, 1)}


def _forecast(recipe: Recipe, processes: int, *, as_json: bool) -> None:
    from heliostat.train.forecast import forecast

    found = forecast(recipe, processes=processes)
    if as_json:
        return print_json(found.to_json())
    print_table(found.rows(), title=f"{recipe.member}: {recipe.sharing}, {recipe.tuner} (nothing is trained)")


def _announced(job: Job) -> Job:
    share = percent(job.trainable / max(job.total, 1))
    note(
        f"{job.recipe.member}: {job.recipe.sharing}, {job.recipe.tuner}; trainable {job.trainable:,} of "
        f"{job.total:,} parameters ({share}); {len(job.examples):,} examples, {job.steps:,} steps"
    )
    return job


def _facts(recipe: Recipe, outcome: Outcome, onlooker: Onlooker) -> dict[str, Any]:
    """Everything a run came to; loads base and member as serving does, and asks both."""
    from heliostat.build import device_named
    from heliostat.family import BASE
    from heliostat.llm import LLM

    last = outcome.history[-1]
    llm = LLM(recipe.family, members=[BASE, recipe.member], device=device_named(recipe.device))
    return {
        "member": recipe.member,
        "sharing": recipe.sharing,
        "tuner": recipe.tuner,
        "parameters": outcome.parameters,
        "steps": last["step"],
        "loss": last["loss"],
        **({"eval_loss": last["eval_loss"]} if "eval_loss" in last else {}),
        **_graded(recipe, llm),
        **onlooker.facts,
        "run_folder": str(outcome.run_folder),
        "samples": _samples(recipe, llm),
    }


def _graded(recipe: Recipe, llm: Any) -> dict[str, Any]:
    """Accuracy on held-out data, remembered by the family; nothing where there are none."""
    from heliostat.train.evaluate import evaluate
    from heliostat.train.tune import JUDGED, note_evaluation

    if recipe.eval_data is None:
        return {}
    try:
        found = evaluate(
            llm,
            recipe.member,
            recipe.eval_data,
            metric=recipe.metric,
            limit=JUDGED,
            skip_bad=recipe.skip_bad,
        )
    except Refused as error:  # the member is there; that its answers cannot be graded takes nothing from it
        note(f"accuracy not measured: {error}")
        return {}
    note_evaluation(Path(recipe.family), recipe.member, found.facts)
    return found.facts


def _samples(recipe: Recipe, llm: Any) -> list[dict[str, str]]:
    """What base and member say to a few held-out prompts, or to training ones where none are held out."""
    from heliostat.family import BASE
    from heliostat.train.data import question_ids
    from heliostat.train.tune import first_prompts

    kept = []
    for record in (record for record in first_prompts(recipe, SAMPLES) if record.turns):
        with suppress(Refused):  # a line that training left out, too
            kept.append((record, question_ids(record, llm.tokenizer, max_length=llm.engine.max_length - 1)))
    asked = [p for _, p in kept]
    answers = llm.generate(
        asked * 2, member=[BASE] * len(asked) + [recipe.member] * len(asked), max_tokens=128
    )
    return [
        {
            "prompt": record.asked,
            "before": before.text,
            "after": after.text,
            **({"reference": record.answer} if record.answer is not None else {}),
        }
        for (record, _), before, after in zip(kept, answers[: len(kept)], answers[len(kept) :], strict=True)
    ]


def _show(recipe: Recipe, outcome: Outcome, facts: Mapping[str, Any]) -> None:
    samples = facts["samples"]
    if samples:
        kind = "held-out" if recipe.eval_data else "training"
        print_samples(samples, title=f"{kind} prompts, before (base) and after ({recipe.member})")
    rows = [("sharing", recipe.sharing), ("steps", f"{facts['steps']:,}"), ("loss", f"{facts['loss']:.4f}")]
    if "eval_loss" in facts:
        rows.append(("eval loss", f"{facts['eval_loss']:.4f}"))
    if "accuracy" in facts:
        cut = f", {facts['cut']} cut by their length" if facts["cut"] else ""
        right = percent(facts["accuracy"])
        rows.append(("accuracy", f"{right} ({facts['metric']}, {facts['items']} items{cut})"))
    rows += _speed(facts)
    print_table(rows, title=f"{recipe.member} is a member of {recipe.family}")
    print(f"run: {outcome.run_folder} (recipe.yaml, log.jsonl, loss.svg)")
    print_next(_next(recipe))


def _speed(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [("seconds", f"{facts['seconds']:,.1f}"), ("tokens/s", f"{facts['tokens_per_second']:,.0f}")]


def _next(recipe: Recipe) -> list[Sequence[object]]:
    who = [recipe.family, "--member", recipe.member]
    data = recipe.eval_data or "TEST.jsonl"
    return [
        ["generate", *who, "--prompt", "your prompt"],
        ["chat", *who],
        ["eval", *who, "--data", data, "--metric", recipe.metric],
        ["check", *who],
        ["export", *who, "--out", "DIR"],
    ]


def _show_pretrained(made: Pretrained, onlooker: Onlooker, *, as_json: bool) -> None:
    last, run = made.history[-1], made.folder.with_name(f"{made.folder.name}.run")
    facts = {
        "output_dir": str(made.folder),
        "parameters": made.parameters,
        "tokens": made.tokens,
        "steps": last["step"],
        "loss": last["loss"],
        "eval_loss": last["eval_loss"],
        "eval_perplexity": last["eval_perplexity"],
        **onlooker.facts,
        "run_folder": str(run),
    }
    if as_json:
        return print_json(facts)
    rows = [
        ("parameters", f"{made.parameters:,}"),
        ("tokens", f"{made.tokens:,}"),
        ("loss", f"{last['loss']:.4f}"),
        ("eval loss", f"{last['eval_loss']:.4f} (perplexity {last['eval_perplexity']:.2f})"),
        *_speed(facts),
    ]
    print_table(rows, title=f"{made.folder}: a new base")
    print(f"run: {run} (recipe.yaml, log.jsonl, steps.jsonl, loss.svg, gradient.svg)")
    print_next(
        [
            ["init", "FAM", "--base", made.folder],
            ["generate", "FAM", "--prompt", "your prompt"],
            ["train", "FAM", "--member", "NAME", "--sharing", "SHARING", "--data", "DATA.jsonl"],
        ]
    )
