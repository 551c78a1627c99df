"""What pretraining is asked to do: the shape of a new base, its text, its schedule. Knows no tensors."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from heliostat.errors import Refused
from heliostat.train.recipe import Auto, Count, Pace, Paths, Positive, Scheduler, Share, Weight, filled_in


class PretrainRecipe(Pace):
    """How a base is made from scratch: its shape, its text, its schedule."""

    output_dir: str = Field(min_length=1)
    """Folder for the new checkpoint, in Hugging Face's layout."""
    data: Paths = ("embedded",)
    """Text: files of plain UTF-8 text, jsonl of the kinds `train` reads, or embedded: the built-in corpus."""
    eval_data: str | None = None
    """Held-out text; none: a small part of data is held out."""
    tokenizer: str | None = None
    """Folder with tokenizer.json; none: a byte-level BPE of vocab_size is trained on the data."""
    architecture: Literal["llama", "mistral", "qwen2", "qwen3"] = "llama"
    """Family of models whose layout is made."""
    vocab_size: int = Field(1024, ge=260)
    """Tokens of the tokenizer that is trained; with a tokenizer of its own, rows of the embedding."""
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
        return self

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.max_length

    def warmup_steps(self) -> int:
        """Steps of warm-up."""
        return round(self.warmup_ratio * self.max_steps)

    def resolve(self, *, bf16: bool, device: str = "cpu") -> SettledPretraining:
        """The same recipe with every `auto` a value; ``bf16``: whether ``device`` is fast at it."""
        settled = {"bf16": bf16, "device": device, "head_dim": self.hidden_size // self.num_attention_heads}
        return SettledPretraining(**filled_in(self, settled))


class SettledPretraining(PretrainRecipe):
    """A pretraining recipe without `auto`."""

    bf16: bool
    head_dim: Count
