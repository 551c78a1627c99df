"""What a run is asked to do: every argument once, with its help, its limits and what `auto` comes to.

Arguments are named as in transformers and trl. A recipe never changes: `resolve` makes a new one in which
every `auto` is a value. Reading, writing and other tools' spellings are in train.spellings. Knows no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from heliostat.errors import Refused
from heliostat.family import BASE, SHARINGS, Row, choose, sharing_named
from heliostat.tasks.grade import DEFAULT_METRIC, METRICS, METRICS_SHOWN
from heliostat.train.droprates import HIGHEST

Auto = Literal["auto"]
Tuner = Literal["full", "lora", "paca"]
Choice = Literal["random", "norm", "gradient"]
Tracker = Literal["none", "tensorboard", "wandb", "trackio"]
Scheduler = Literal["linear", "cosine", "constant", "warmup_stable_decay"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

READERS_OF_KEYS = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linears that write no keys and values."""
ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS: Mapping[str, tuple[str, ...]] = {"all": ALL_LINEARS, "query_side": READERS_OF_KEYS}
"""What `auto` target_modules come to, by what the sharing tunes."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """What `auto` comes to for one sharing and tuner."""

    learning_rate: float
    lr_scheduler_type: Scheduler
    warmup_ratio: float
    weight_decay: float
    r: int = 64


ANY = "*"
DEFAULTS: Mapping[tuple[str, str], Defaults] = {
    ("independent", "full"): Defaults(1e-4, "cosine", 0.03, 0.01),
    ("independent", "lora"): Defaults(2e-4, "cosine", 0.03, 0.01),
    ("independent", "paca"): Defaults(6e-4, "cosine", 0.03, 0.01, r=128),
    ("sun", "full"): Defaults(1e-4, "linear", 0.1, 0.0),
    ("sun", "lora"): Defaults(2e-4, "linear", 0.1, 0.0),
    ("sun", "paca"): Defaults(6e-4, "linear", 0.1, 0.0, r=128),
    ("prefillshare", "full"): Defaults(1e-4, "cosine", 0.03, 0.1),
    ("prefillshare", "lora"): Defaults(2e-4, "cosine", 0.03, 0.01),
    ("prefillshare", "paca"): Defaults(2e-4, "cosine", 0.03, 0.01, r=128),
    ("icarus", "full"): Defaults(1e-4, "cosine", 0.03, 0.01),
    ("icarus", "lora"): Defaults(2e-4, "cosine", 0.03, 0.01, r=128),
    ("icarus", "paca"): Defaults(2e-4, "cosine", 0.03, 0.01, r=256),
    (ANY, "full"): Defaults(1e-4, "cosine", 0.03, 0.01),
    (ANY, "lora"): Defaults(2e-4, "cosine", 0.03, 0.01),
    (ANY, "paca"): Defaults(2e-4, "cosine", 0.03, 0.01, r=128),
}
"""By sharing and tuner; a sharing without a line of its own takes the line of ANY."""


def _as_list(value: Any) -> Any:
    """One path or name may be given without a list, several with commas between them."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _targets(value: Any) -> Any:
    if value in ("auto", "all-linear", "all"):
        return "auto" if value == "auto" else ALL_LINEARS
    return _as_list(value)


Names = Annotated[tuple[str, ...], Field(min_length=1)]
Paths = Annotated[
    tuple[str, ...], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(min_length=1)
]


class Pace(BaseModel):
    """How a run descends, logs and saves: what tuning and pretraining have in common."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    per_device_train_batch_size: Count = 8
    """Examples that go through the model at once."""
    gradient_accumulation_steps: Count = 1
    """Batches whose gradients are added up for one optimizer step."""
    adam_beta1: Share = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: Share = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: Positive = 1e-8
    """Added to AdamW's denominator."""
    max_grad_norm: Weight = 1.0
    """Gradients longer than this are shortened to it; 0: never."""
    decay_ratio: float = Field(0.2, gt=0, le=1)
    """With warmup_stable_decay: share of the steps in which the learning rate falls to zero."""
    bf16: bool | Auto = "auto"
    """Compute in bfloat16; auto: where the hardware is fast at it."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Order of the data and initial values; the same seed gives the same run."""
    logging_steps: Count = 10
    """Steps from one log line to the next."""
    eval_steps: int = Field(0, ge=0)
    """Steps from one evaluation to the next; 0: only at the end."""
    save_steps: int = Field(100, ge=0)
    """Steps from one checkpoint to the next; 0: only at the end and on Ctrl-C."""
    save_total_limit: Count = 2
    """Checkpoints that are kept; older ones are removed."""
    report_to: Tracker = "none"
    """Where metrics go beside log.jsonl and the loss curve: nowhere else, or to a tracker (an extra to install)."""
    device: str = Field("auto", min_length=1)
    """Where it computes: cpu, cuda or cuda:N; auto: cuda where torch sees one, else cpu."""
    data_parallel: Literal["fsdp", "ddp"] = "fsdp"
    """With several processes: fsdp parts weights and moments among them, too; ddp keeps all of them in each."""
    resume_from_checkpoint: bool | Auto = "auto"
    """auto: go on with an unfinished run of this recipe; true: refuse to begin anew; false: begin anew."""

    @property
    def batch_size(self) -> int:
        """Examples of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class Recipe(Pace):
    """How one member of a family is tuned."""

    family: str = Field(min_length=1)
    """Folder of the family, made by `heliostat init`."""
    member: str = Field(min_length=1)
    """Name of the new member."""
    sharing: str = Field(description=f"What the member shares with the family: {', '.join(SHARINGS)}.")
    data: Paths
    """Training data: jsonl of messages, prompt/completion, alpaca, sharegpt or text records."""
    eval_data: str | None = None
    """Held-out data of the same kinds, for evaluation during the run and at its end."""
    eval_samples: Count = 200
    """Held-out answers that are graded by metric at each eval_steps."""
    teacher: str | None = None
    """Member or module whose answers are learned, not the data's; the data may then be prompts alone."""
    speaker: str | None = None
    """Frozen module that speaks in the base's place (sun): one that `heliostat quantize` made."""
    writer: str | None = None
    """Frozen module that writes in the base's place (prefillshare, icarus); an adapter rides on it, too."""
    tuner: Tuner | Auto = "auto"
    """full: all of the member's own weights; lora: a low-rank adapter; paca: some columns of each weight; auto: lora for
    icarus, else full."""
    r: Count | Auto | None = "auto"
    """Rank of the adapter, or columns of each weight (tuner lora, paca); auto: by sharing, no more than fits the width."""
    lora_alpha: Positive | Auto | None = "auto"
    """The adapter is scaled by lora_alpha / r (tuner lora); auto: 2 r."""
    target_modules: Annotated[Names | Auto | None, BeforeValidator(_targets)] = "auto"
    """Linears with an adapter: q_proj,o_proj, or all-linear (tuner lora, paca); auto: those the sharing leaves."""
    columns: Choice | Auto | None = "auto"
    """Which columns are tuned (tuner paca): random, the longest (norm), or by the first batch's gradient; auto: random."""
    learning_rate: Positive | Auto = "auto"
    """Peak learning rate; auto: by sharing and tuner."""
    lr_scheduler_type: Scheduler | Auto = "auto"
    """How the learning rate falls: linear, cosine, constant or warmup_stable_decay; auto: by sharing."""
    warmup_ratio: Share | Auto = "auto"
    """Share of the steps in which the learning rate rises to its peak; auto: by sharing."""
    weight_decay: Weight | Auto = "auto"
    """Decay of weight matrices by AdamW; auto: by sharing."""
    dropbp: float = Field(0.0, ge=0, le=HIGHEST)
    """Share of the residual branches' backward pass that is left out, by DropBP; 0: none."""
    dropbp_rates: Literal["sensitivity", "uniform"] = "sensitivity"
    """Which branches dropbp leaves out: the least sensitive most often, measured after a tenth of the run, or all alike."""
    num_train_epochs: Positive = 1.0
    """Times the data are gone through."""
    max_steps: int = -1
    """Optimizer steps, instead of num_train_epochs; -1: by epochs."""
    max_length: int = Field(1024, ge=2)
    """Most tokens of an example, prompt and answer together. See too_long for longer ones; none is cut."""
    too_long: Literal["refuse", "skip"] = "refuse"
    """Records longer than max_length: refuse the run, or skip and count them."""
    packing: bool = False
    """Not for tuning, which groups examples by length: only `heliostat pretrain` packs rows."""
    skip_bad: bool = False
    """Leave out lines that cannot be read, and count them, instead of refusing the run."""
    metric: str = Field(DEFAULT_METRIC, description=f"How answers to eval_data are graded. {METRICS_SHOWN}.")

    @model_validator(mode="before")
    @classmethod
    def _settle_tuner(cls, values: Any) -> Any:
        """The sharing says what `auto` is at once: which other arguments make sense hangs on it."""
        sharing = SHARINGS.get(str(values.get("sharing")))
        if sharing is None or values.get("tuner", "auto") != "auto":
            return values
        return {**values, "tuner": sharing.tuner}

    @model_validator(mode="after")
    def _agree(self) -> Recipe:
        sharing_named(self.sharing).replaced(speaker=self.speaker, writer=self.writer)
        choose(self.metric, METRICS, what="metric")
        if self.packing:
            raise Refused(
                "packing true: tuning groups examples by length instead; only `heliostat pretrain` packs rows"
            )
        if self.max_steps != -1 and self.max_steps < 1:
            raise Refused(f"max_steps is {self.max_steps}; it must be at least 1, or -1 for num_train_epochs")
        idle = sorted(set(_ADAPTERS) - _ARGUMENTS[str(self.tuner)])
        if given := [name for name in idle if getattr(self, name) not in ("auto", None)]:
            raise Refused(f"{', '.join(given)}: {_NOT_FOR[str(self.tuner)]}")
        return self

    def resolve(self, *, bf16: bool, hidden_size: int, device: str = "cpu") -> Settled:
        """The same recipe with every `auto` a value.

        ``bf16``: whether ``device`` is fast at it. ``hidden_size``: the model's width, in channels.
        """
        defaults = DEFAULTS.get((self.sharing, self.tuner), DEFAULTS[ANY, self.tuner])
        settled = {
            "bf16": bf16,
            "device": device,
            "learning_rate": defaults.learning_rate,
            "lr_scheduler_type": defaults.lr_scheduler_type,
            "warmup_ratio": defaults.warmup_ratio,
            "weight_decay": defaults.weight_decay,
            **self._adapter(defaults, hidden_size),
        }
        return Settled(**filled_in(self, settled))

    def _adapter(self, defaults: Defaults, hidden_size: int) -> dict[str, Any]:
        if self.tuner == "full":
            return dict.fromkeys(_ADAPTERS)
        widest = widest_rank(hidden_size) * (2 if self.tuner == "paca" else 1)
        r = self.r if isinstance(self.r, int) else min(defaults.r, widest)
        own: dict[str, Any] = {"lora_alpha": 2.0 * r, "columns": None}
        if self.tuner == "paca":
            own = {"lora_alpha": None, "columns": "random"}
        return {"r": r, "target_modules": TARGETS[SHARINGS[self.sharing].targets], **own}

    def made(self, settled: Mapping[str, Any], *, ignored: Iterable[str] = ()) -> bool:
        """Whether a member's remembered recipe is what this one comes to, but for the ``ignored`` arguments."""
        asked = self.model_dump(mode="json", exclude={"family", "member", *ignored})
        longest = settled.get("max_length", 0)  # never more than the model takes
        fields = type(self).model_fields
        return longest <= asked.pop("max_length") and all(
            value in ("auto", settled.get(name, fields[name].default)) for name, value in asked.items()
        )

    def row(self, own: str) -> Row:
        """The row of the member, whose own module is called ``own``."""
        sharing = sharing_named(self.sharing)
        return sharing.instantiate(own, sharing.replaced(speaker=self.speaker, writer=self.writer))

    @property
    def seat(self) -> str:
        """The module that an adapter rides on."""
        return self.writer or BASE

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run."""
        return (
            self.max_steps
            if self.max_steps > 0
            else max(1, math.ceil(self.num_train_epochs * steps_per_epoch))
        )


_ADAPTERS = ("r", "lora_alpha", "target_modules", "columns")
_ARGUMENTS = {
    "full": set[str](),
    "lora": {"r", "lora_alpha", "target_modules"},
    "paca": {"r", "target_modules", "columns"},
}
_NOT_FOR = {
    "full": "for tuner lora and paca only, and tuner is full; say tuner: lora, or drop it",
    "lora": "for tuner paca only, and tuner is lora; say tuner: paca, or drop it",
    "paca": "for tuner lora only. With paca it would be a factor of learning_rate (lora_alpha / r): raise that instead",
}


class Settled(Recipe):
    """A recipe without `auto`, as `resolve` makes it and as it is written beside the result."""

    tuner: Tuner
    bf16: bool
    r: Count | None
    lora_alpha: Positive | None
    target_modules: Names | None
    columns: Choice | None
    learning_rate: Positive
    lr_scheduler_type: Scheduler
    warmup_ratio: Share
    weight_decay: Weight

    @property
    def adapts(self) -> bool:
        """Whether the member is an adapter on the base, not weights of its own."""
        return self.tuner != "full"

    def warmup_steps(self, total: int) -> int:
        """Steps of warm-up in a run of so many."""
        return round(self.warmup_ratio * total)

    def check_targets(self, linears: Mapping[str, tuple[int, int]]) -> None:
        """Refuse target_modules that are none of the model's ``linears``, or that the sharing never uses.

        ``linears``: inputs and outputs of each, by name. More columns than inputs are refused, too.
        """
        targets, names = set(self.target_modules or ()), set(linears)
        if unknown := sorted(targets - names):
            raise Refused(f"target_modules {', '.join(unknown)}: this model has {', '.join(sorted(names))}")
        idle = sorted(targets - set(READERS_OF_KEYS))
        if idle and SHARINGS[self.sharing].targets == "query_side":
            raise Refused(
                f"target_modules {', '.join(idle)}: under {self.sharing!r} the member writes no keys or values"
            )
        for name in self.target_modules or () if self.tuner == "paca" else ():
            if self.r is not None and self.r > (inputs := linears[name][0]):
                raise Refused(f"r is {self.r}: {name} has {inputs} inputs, so no more columns can be tuned")


def filled_in(recipe: Pace, settled: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a recipe, with the settled value wherever `auto` was asked for."""
    asked = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    return {
        name: settled[name] if value == "auto" and name in settled else value for name, value in asked.items()
    }


def widest_rank(hidden_size: int) -> int:
    """Largest power of two up to an eighth of the width: beyond it an adapter is hardly low-rank."""
    return 1 << max(0, (hidden_size // 8).bit_length() - 1)
