"""What a run will need, said before anything is loaded: parameters, memory, time.

The family's config and the data are read; one block of the model's shape is probed (``train.probe``). Everything else
is counting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from heliostat.build import config_of, load_tokenizer, read_family
from heliostat.family import SHARINGS, Family, Row
from heliostat.files import readable_size
from heliostat.model.config import ModelConfig, adapter_parameters
from heliostat.model.tokenizer import Tokenizer
from heliostat.train.data import Batches, Example, Examples
from heliostat.train.evaluate import CACHE_MIB as EVALUATION_MIB
from heliostat.train.job import joined, judged, learned, refuse_unfit, settle, teacher_row
from heliostat.train.objective import COLUMNS
from heliostat.train.probe import MIB, OWN, Probe, probe, resident_besides
from heliostat.train.recipe import Recipe, Settled
from heliostat.train.sharing import lay_out
from heliostat.train.teacher import CACHE_MIB, asked_examples

TEACHER = "teacher"


@dataclass(frozen=True, slots=True)
class Forecast:
    """The numbers of a dry run. Bytes, seconds, counts."""

    trainable: int
    frozen: int
    """Parameters that are loaded and do not move."""
    examples: int
    skipped: int
    """Lines of the data that are left out."""
    answer_tokens: int
    """Tokens that carry loss in one epoch; of a teacher's answers, which are not known yet, an estimate."""
    steps: int
    tokens_per_step: Mapping[str, float]
    """Tokens each module runs in a mean step, padding included."""
    processes: int
    """That train together; memory and tokens are those of each."""
    weights: int
    teacher: int
    """Its weights."""
    optimizer: int
    """Gradients and AdamW's two moments."""
    activations: int
    pages: int
    """Keys and values while a teacher answers, or the member in an evaluation during the run."""
    process: int
    """What Python and its libraries hold before anything is loaded."""
    seconds_per_step: float
    seconds_answering: float
    """Time in which a teacher answers before the run, or the member in evaluations during it."""

    @property
    def memory(self) -> int:
        """Resident memory at the peak, bytes.

        A sum, although gradients grow while activations go: the C library keeps what is freed for tensors of the same
        size, so that what does not stand side by side still adds up.
        """
        training = self.weights + self.optimizer + self.activations
        return (
            self.process
            + self.teacher
            + (max(training, self.pages) if self.teacher else training + self.pages)
        )

    @property
    def seconds(self) -> float:
        """The whole run."""
        return self.steps * self.seconds_per_step + self.seconds_answering

    def rows(self) -> list[tuple[str, str]]:
        """The forecast as lines of a table."""
        tokens = ", ".join(f"{name} {count:,.0f}" for name, count in self.tokens_per_step.items())
        return [
            (
                "trainable parameters",
                f"{self.trainable:,} ({self.trainable / (self.trainable + self.frozen):.1%} of what is loaded)",
            ),
            ("frozen parameters", f"{self.frozen:,}"),
            ("examples, answer tokens", f"{self.examples:,}, {self.answer_tokens:,}"),
            *([("lines left out", f"{self.skipped:,}")] if self.skipped else []),
            ("optimizer steps", f"{self.steps:,}"),
            ("tokens a step, by module", tokens),
            (
                "memory" if self.processes == 1 else f"memory of each of {self.processes} processes",
                readable_size(self.memory),
            ),
            ("  weights", readable_size(self.weights)),
            *([("  teacher", readable_size(self.teacher))] if self.teacher else []),
            ("  gradients and optimizer", readable_size(self.optimizer)),
            ("  activations", readable_size(self.activations)),
            *([("  pages for answers", readable_size(self.pages))] if self.pages else []),
            ("  Python and libraries", readable_size(self.process)),
            (
                "time",
                f"about {_duration(self.seconds)} ({self.seconds_per_step:.2f} s a step)",
            ),
        ]

    def to_json(self) -> dict[str, Any]:
        """All numbers, the sums included."""
        return asdict(self) | {"memory": self.memory, "seconds": self.seconds}


def forecast(recipe: Recipe, *, processes: int = 1) -> Forecast:
    """Numbers for a recipe on this machine; of ``processes`` that train together, memory and tokens are of each.

    Raises Refused for what the run itself would refuse in recipe or data.
    """
    folder = Path(recipe.family)
    family = read_family(folder)
    family.free_name(recipe.member, folder=recipe.family)
    config, tokenizer = config_of(folder, family), load_tokenizer(folder, family)
    settled = settle(recipe, config)
    row = settled.row(OWN)
    refuse_unfit(family, settled)
    data = _expected(settled, tokenizer, row, family)
    _, questions = judged(settled, tokenizer)
    shape = Shape(config, settled, row, data.examples)
    teaching = _teacher_weights(family, config, settled)
    steps = settled.total_steps(-(-len(data.examples) // (settled.batch_size * processes)))
    trainable, own_weights = _own(config, settled)
    frozen, frozen_weights = _frozen(config, settled, row, trainable)
    asked = questions[: settled.eval_samples] if settled.eval_steps else ()
    taught = shape.answering(len(data.examples)) if settled.teacher is not None else (0, 0.0)
    graded = shape.answering(len(asked))
    evaluations = steps // settled.eval_steps if settled.eval_steps else 0
    return Forecast(
        trainable=trainable,
        frozen=frozen,
        examples=len(data.examples),
        skipped=len(data.bad) + len(data.too_long),
        answer_tokens=data.answer_tokens,
        steps=steps,
        tokens_per_step=shape.tokens_per_step,
        processes=processes,
        weights=_part(config, settled, row, own_weights + frozen_weights, processes),
        teacher=teaching,
        optimizer=trainable * 12 // (processes if settled.data_parallel == "fsdp" else 1),
        activations=shape.activations,
        pages=max(graded[0], taught[0]),
        process=resident_besides(),
        seconds_per_step=shape.seconds_per_step,
        seconds_answering=taught[1] + evaluations * graded[1],
    )


def _expected(recipe: Settled, tokenizer: Tokenizer, row: Row, family: Family) -> Examples:
    """What will be learned; a teacher's answers are not known yet: they are taken to be as long as the data's."""
    if recipe.teacher is None:
        return learned(recipe, tokenizer, row, None)
    teacher_row(family, recipe.teacher)
    options: dict[str, Any] = {"max_length": recipe.max_length, "skip_bad": recipe.skip_bad}
    return joined([asked_examples(p, tokenizer, too_long=recipe.too_long, **options) for p in recipe.data])


def _teacher_weights(family: Family, config: ModelConfig, recipe: Settled) -> int:
    """Bytes of the teacher, which is loaded beside everything else."""
    if recipe.teacher is None:
        return 0
    module = family.module(family.row(recipe.teacher).speaker)
    adapter = module.parameters * 4 if module.base is not None else 0
    return config.parameters * (2 if recipe.bf16 else 4) + adapter


def _frozen(config: ModelConfig, recipe: Settled, row: Row, trainable: int) -> tuple[int, int]:
    """Parameters that are loaded and do not move, and bytes of those that are not in the member's own weights."""
    # In codebooks or not: training loads what they stand for.
    still = {name for name in row.modules if name != OWN} | ({recipe.seat} if recipe.adapts else set())
    beside = config.parameters * len(still)
    idle = config.parameters - trainable if recipe.tuner == "full" else 0
    return beside + idle, beside * (2 if recipe.bf16 else 4)


@dataclass(slots=True)
class Shape:
    """A micro-batch's tokens by module, and what they cost as the blocks of this machine were probed."""

    config: ModelConfig
    recipe: Settled
    row: Row
    examples: Sequence[Example]
    mean: dict[str, float] = field(init=False)
    worst: dict[str, int] = field(init=False)
    probes: dict[str, Probe] = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.worst = _tokens(self.examples, self.recipe, self.row)
        self.probes = {name: probe(self.config, self.recipe, self.row, name) for name in self.worst}

    @property
    def tokens_per_step(self) -> dict[str, float]:
        """Tokens each module runs in a mean step, the base under its own name and the teacher, too."""
        return {n: count * self.recipe.gradient_accumulation_steps for n, count in self.mean.items()}

    @property
    def activations(self) -> int:
        """Bytes kept for the backward pass of a large micro-batch, and what passes through while it is run."""
        layers = self.config.layers
        kept = {name: self.probes[name].bytes * count for name, count in self.worst.items()}
        kept[OWN] *= 1 - self.recipe.dropbp  # a branch without a tape keeps nothing
        # Gradients of one block stand beside everything kept: as much again as that block keeps.
        passing = max(kept.values())
        return round(sum(kept.values()) * layers + passing) + self._written + self._head

    @property
    def _written(self) -> int:
        """Keys and values that one module writes and another reads: as written, and in float32 for attention."""
        if self.row.alone or (self.row.prompt_writer == OWN):  # on the tape, and counted there
            copies = 0 if self.row.alone else 4
        else:
            copies = 4 + (2 if self.recipe.bf16 else 4)
        each = 2 * self.config.kv_heads * self.config.head_width * self.config.layers
        return copies * each * self.worst[self.row.prompt_writer]

    @property
    def _head(self) -> int:
        """Logits, their log-softmax and its gradient, float32, for the answer tokens of a large micro-batch.

        With a teacher its logits, their log-softmax and the divergence of every token stand beside them.
        """
        longest = sorted((sum(b - a for a, b in e.answers) for e in self.examples), reverse=True)
        spoken = sum(longest[: self.recipe.per_device_train_batch_size])
        return (6 if self.recipe.teacher else 3) * 4 * self.config.vocabulary * spoken

    @property
    def seconds_per_step(self) -> float:
        """Time of a mean step's blocks."""
        # Of a block's products two thirds are of the backward pass where all weights are trained, else half.
        left_out = self.recipe.dropbp * (1 / 2 if self.recipe.adapts else 2 / 3)
        once = sum(
            self.probes[n].seconds * self.config.layers * count * (1 - left_out if n == OWN else 1)
            for n, count in self.mean.items()
        )
        return self.recipe.gradient_accumulation_steps * once

    def answering(self, prompts: int) -> tuple[int, float]:
        """(bytes of pages, seconds) while so many prompts are answered, one token of each like another."""
        if not prompts:
            return 0, 0.0
        name = TEACHER if self.recipe.teacher is not None else self.row.prompt_writer
        tokens = prompts * sum(len(e.ids) for e in self.examples) / len(self.examples)
        width = 2 if self.recipe.bf16 and (self.recipe.teacher or self.recipe.adapts) else 4
        each = 2 * self.config.kv_heads * self.config.head_width * self.config.layers * width
        limit = (CACHE_MIB if self.recipe.teacher is not None else EVALUATION_MIB) * MIB
        return round(min(limit, tokens * each)), tokens * self.config.layers * self.probes[name].seconds


def _part(config: ModelConfig, recipe: Settled, row: Row, weights: int, processes: int) -> int:
    """Bytes of weights in each process: its part, and what is put together while a pass runs.

    That is all that is no block, for each whole module, and two blocks: the one that runs and the next.
    """
    if processes == 1 or recipe.data_parallel == "ddp":
        return weights
    inside = sum(a * b for a, b in config.linears.values())
    models = (
        len({name for name in row.modules if name != OWN} | {recipe.seat})
        if recipe.adapts
        else len(row.modules)
    )
    together = models * (config.parameters - config.layers * inside) + 2 * inside
    return weights // processes + together * 4


def _own(config: ModelConfig, recipe: Settled) -> tuple[int, int]:
    """Parameters that are trained, and bytes of the member's own weights (with their copies in bfloat16)."""
    if recipe.tuner == "lora":
        trained = adapter_parameters(config, recipe.r or 0, recipe.target_modules or ())
        return trained, trained * 4
    if recipe.tuner == "paca":
        outputs = sum(config.linears[name][1] for name in recipe.target_modules or ())
        trained = config.layers * outputs * (recipe.r or 0)
        # Where the columns stand in the weights, the pretrained ones are kept beside them.
        kept = (2 if recipe.bf16 else 4) if SHARINGS[recipe.sharing].row.alone else 0
        return trained, trained * (4 + kept)
    trained = config.parameters
    if SHARINGS[recipe.sharing].targets == "query_side":
        sides = [config.linears[name] for name in ("k_proj", "v_proj")]
        per_layer = sum(a * b + b * config.qkv_bias for a, b in sides)
        trained -= config.layers * (per_layer + config.head_width * config.qk_norm)
    return trained, config.parameters * (6 if recipe.bf16 else 4)


def _tokens(
    examples: Sequence[Example], recipe: Settled, row: Row
) -> tuple[dict[str, float], dict[str, int]]:
    """Padded tokens that each module runs in a micro-batch: mean and most."""
    batches = Batches(examples, batch_size=recipe.per_device_train_batch_size, seed=recipe.seed)
    seen = [batches.at(step) for step in range(min(batches.steps_per_epoch, 64))]
    counts: dict[str, list[int]] = {}
    for batch in seen:
        layout = lay_out(batch, row, multiple=COLUMNS)
        counts.setdefault(row.prompt_writer, []).append(layout.prompt.numel())
        if layout.answers is not None:
            for name in dict.fromkeys(n for n in (row.answer_writer, row.speaker) if n != row.prompt_writer):
                counts.setdefault(name, []).append(layout.answers.ids.numel())
        if recipe.teacher is not None:  # it reads every example from end to end
            whole = layout.prompt.shape[0] * max(len(e.ids) - 1 for e in batch)
            counts.setdefault(TEACHER, []).append(whole)
    return {n: sum(c) / len(seen) for n, c in counts.items()}, {n: max(c) for n, c in counts.items()}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
