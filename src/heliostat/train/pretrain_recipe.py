"""What pretraining is asked to do: the shape of a new base, its text, its schedule. Knows no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from heliostat.errors import Refused
from heliostat.model.attention_kind import NAMES, AttentionKind
from heliostat.train.recipe import Auto, Count, Pace, Paths, Positive, Scheduler, Share, Weight, filled_in

Attention = Literal["softmax", "sink", "gated", "affine", "affine+gated"]
_WITH_TEACHER = ("distill_weight", "distill_temperature")
_WITH_AFFINE = ("n", "alpha")


class PretrainRecipe(Pace):
    """How a base is made from scratch: its shape, its text, its schedule."""

    output_dir: str = Field(min_length=1)
    """Folder for the new checkpoint, in Hugging Face's layout."""
    data: Paths = ("embedded",)
    """Text: files of plain UTF-8 text, jsonl of the kinds `train` reads, or embedded: the built-in corpus."""
    eval_data: str | None = None
    """Held-out text; none: eval_share of the data is held out."""
    eval_share: float = Field(0.01, gt=0, lt=1)
    """Share of the documents of each file that is held out where there is no eval_data."""
    document: Literal["paragraph", "file"] = "paragraph"
    """What a document of a plain text file is: what stands between empty lines, or the whole file."""
    tokenizer: str | None = None
    """Folder with tokenizer.json; none: the teacher's, or a byte-level BPE of vocab_size is trained on the data."""
    teacher: str | None = None
    """Folder of a model with the same tokenizer, whose distribution of every next token is learned beside the text."""
    distill_weight: Annotated[float, Field(ge=0, le=1)] | Auto | None = "auto"
    """With a teacher: its share of the loss, the text's own is the rest; auto: 0.5."""
    distill_temperature: Positive | Auto | None = "auto"
    """With a teacher: both distributions are compared at this temperature; auto: 1."""
    architecture: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    """Family of models whose layout is made."""
    attention: Attention = "softmax"
    """How a query reads values: softmax; sink: with a learned logit that reads nothing; gated: each head times a sigmoid of
    its input; affine: softmax scaled per token and head, plus a share of all values; affine+gated: both."""
    n: Literal["visible", "fixed"] | Auto | None = "auto"
    """With affine attention, what the sum of values is divided by: the tokens seen, or max_length always; auto: visible."""
    alpha: Literal["learned", "constant"] | Auto | None = "auto"
    """With affine attention, its scale: a function of the token, or 0.5 always (a control); auto: learned."""
    vocab_size: int = Field(1024, ge=260)
    """Tokens of the tokenizer that is trained; with a given one, rows of the embedding; with a teacher, as it has."""
    hidden_size: int = Field(192, ge=8)
    """Width of the model."""
    num_hidden_layers: Count = 6
    """Transformer blocks."""
    num_attention_heads: Count = 6
    """Query heads."""
    num_key_value_heads: Count = 2
    """Key and value heads; query heads must be a multiple."""
    head_dim: Count | Auto = "auto"
    """Width of a head, even; auto: hidden_size / num_attention_heads."""
    intermediate_size: Count = 512
    """Width inside the feed-forward part."""
    tie_word_embeddings: bool = True
    """Whether the output layer is the embedding."""
    max_position_embeddings: int = Field(1024, ge=2)
    """Longest text the model is made for, in tokens."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary frequencies."""
    max_length: int = Field(256, ge=2)
    """Tokens of a packed row; a batch has per_device_train_batch_size x gradient_accumulation_steps rows."""
    max_steps: Count = 1000
    """Optimizer steps."""
    learning_rate: Positive = 2e-3
    """Peak learning rate."""
    lr_scheduler_type: Scheduler = "warmup_stable_decay"
    """How the learning rate falls: linear, cosine, constant or warmup_stable_decay."""
    warmup_ratio: Share = 0.05
    """Share of the steps in which the learning rate rises to its peak."""
    weight_decay: Weight = 0.1
    """Decay of weight matrices by AdamW."""
    adam_beta2: Share = 0.95
    """Decay of AdamW's mean of squared gradients."""

    @model_validator(mode="before")
    @classmethod
    def _read_tokenizer(cls, values: Any) -> Any:
        """``tokenizer: {train: {vocab_size: N}}`` says in one place what else takes two arguments."""
        asked = values.get("tokenizer")
        if not isinstance(asked, dict):
            return values
        inner = asked.get("train")
        if set(asked) != {"train"} or not isinstance(inner, dict) or set(inner) != {"vocab_size"}:
            raise Refused(f"tokenizer is {asked!r}; it must be a folder, or {{train: {{vocab_size: N}}}}")
        if values.get("vocab_size", inner["vocab_size"]) != inner["vocab_size"]:
            raise Refused(
                f"vocab_size is {values['vocab_size']}, and tokenizer says {inner['vocab_size']}: keep one"
            )
        if values.get("teacher"):
            raise Refused("tokenizer: one is trained, and a teacher's must be the same: leave tokenizer out")
        return {**values, "tokenizer": None, "vocab_size": inner["vocab_size"]}

    @model_validator(mode="after")
    def _agree(self) -> PretrainRecipe:
        heads, width = self.num_attention_heads, self.hidden_size
        if heads % self.num_key_value_heads:
            raise Refused(
                f"num_attention_heads {heads}: no multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim == "auto" and width % heads:
            raise Refused(f"hidden_size {width} is no multiple of num_attention_heads {heads}: give head_dim")
        head_dim = width // heads if self.head_dim == "auto" else self.head_dim
        if head_dim % 2:
            raise Refused(f"head_dim is {head_dim}; rotary positions need an even one")
        if self.max_length > self.max_position_embeddings:
            raise Refused(
                f"max_length {self.max_length}: above max_position_embeddings {self.max_position_embeddings}"
            )
        self._refuse_idle(_WITH_TEACHER, self.teacher is not None, "for a teacher only, and there is none")
        affine = "affine" in NAMES[self.attention]
        self._refuse_idle(
            _WITH_AFFINE, affine, f"for affine attention only, and attention is {self.attention}"
        )
        if self.n == "fixed" and self.max_position_embeddings > self.max_length:
            raise Refused(
                f"n fixed: values are divided by max_length {self.max_length}, so no longer text was ever trained: "
                f"say max_position_embeddings {self.max_length}, or n visible"
            )
        return self

    def _refuse_idle(self, names: Sequence[str], used: bool, why: str) -> None:
        if not used and (given := [name for name in names if getattr(self, name) not in ("auto", None)]):
            raise Refused(f"{', '.join(given)}: {why}; drop it")

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.max_length

    def warmup_steps(self) -> int:
        """Steps of warm-up."""
        return round(self.warmup_ratio * self.max_steps)

    def resolve(self, *, bf16: bool, device: str = "cpu") -> SettledPretraining:
        """The same recipe with every `auto` a value; ``bf16``: whether ``device`` is fast at it."""
        affine = "affine" in NAMES[self.attention]
        settled = {
            "n": "visible" if affine else None,
            "alpha": "learned" if affine else None,
            "bf16": bf16,
            "device": device,
            "head_dim": self.hidden_size // self.num_attention_heads,
            "distill_weight": 0.5 if self.teacher is not None else None,
            "distill_temperature": 1.0 if self.teacher is not None else None,
        }
        return SettledPretraining(**filled_in(self, settled))


class SettledPretraining(PretrainRecipe):
    """A pretraining recipe without `auto`."""

    bf16: bool
    head_dim: Count
    n: Literal["visible", "fixed"] | None
    alpha: Literal["learned", "constant"] | None
    distill_weight: Annotated[float, Field(ge=0, le=1)] | None
    distill_temperature: Positive | None

    @property
    def attention_kind(self) -> AttentionKind:
        """The kind of attention as the model's config has it; where N is fixed it is max_length."""
        if self.n is None or self.alpha is None:
            return AttentionKind(self.attention)
        return AttentionKind(
            self.attention, self.n, self.max_length if self.n == "fixed" else None, self.alpha
        )
