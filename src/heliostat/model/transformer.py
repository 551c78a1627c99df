"""The one transformer, for training and for serving. It reaches keys and values only through ``Attend``.

Parameter names are Hugging Face's, so a checkpoint loads as it is. Shapes: ``...`` is [B, T] in training and [T]
(tokens of many requests, packed) in serving; the transformer never knows which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heliostat.linear.codebook import coded_linears
from heliostat.linear.joined import Joined, piece_of
from heliostat.linear.lora import Linear, Route, plain_linear
from heliostat.linear.worn import Wardrobe
from heliostat.model.alpha import Weighing
from heliostat.model.config import ModelConfig
from heliostat.ops import native
from heliostat.ops.codebook_product import ByRows, rows_looked_up
from heliostat.ops.gate import gated
from heliostat.ops.mixing import Mix
from heliostat.ops.native.blocks import LINEARS, Blocks, Extras, Weights
from heliostat.ops.norm import rms_norm
from heliostat.ops.rope import Turned, cos_sin, inverse_frequencies, rotate


class Attend(Protocol):
    """The seam: everything that knows where keys and values live."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mix: Mix = ..., /) -> Tensor:
        """q [..., H, D], k and v [..., K, D] (rotated) -> attention output [..., H, D], mixed as ``mix`` says."""


@dataclass(frozen=True, slots=True)
class Branches:
    """Which residual branches of a block are on the tape; past the others only the identity carries the gradient.

    ``written``: keys and values stay on the tape all the same, because another module reads them.
    """

    attention: bool = True
    mlp: bool = True
    written: bool = False


BOTH = Branches()
Tape = tuple[Branches, ...]
"""The branches of every block of a pass, by layer."""


def _taping(on: bool) -> AbstractContextManager[object]:
    """Where a branch runs: as everything around it, or without a tape, so that nothing is kept for it."""
    return nullcontext() if on else torch.no_grad()


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(Weighing):
    """Grouped-query attention: projections, optional head norms, rotation; the seam does the rest."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config)
        width, d = config.width, config.head_width
        self.layer, self.head_width = layer, d
        self.joined: Joined | None = None
        self.q_proj = Linear(width, config.heads * d, bias=config.qkv_bias)
        self.k_proj = Linear(width, config.kv_heads * d, bias=config.qkv_bias)
        self.v_proj = Linear(width, config.kv_heads * d, bias=config.qkv_bias)
        self.o_proj = Linear(config.heads * d, width, bias=config.o_bias)
        self.q_norm = RMSNorm(d, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(d, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        attend: Attend,
        route: Route | None,
        on: Branches = BOTH,
    ) -> Tensor:
        q, k, v, *gates = self._projected(x, route, on)
        q, k, v = map(self._heads, (q, k, v))
        # Norms run as everything around them: without a tape another kernel would round otherwise.
        q, k = rotate(self.q_norm(q), *angles), rotate(self.k_norm(k), *angles)  # [..., H, D], [..., K, D]
        with _taping(on.attention):
            said = (
                attend(self.layer, q, k, v)
                if self.kind.plain
                else attend(self.layer, q, k, v, self.mix(gates))
            )
            return self.o_proj(said.flatten(-2), route)

    def _projected(self, x: Tensor, route: Route | None, on: Branches) -> tuple[Tensor, ...]:
        if self.joined is not None:
            return self.joined(self, x, route).split(self.joined.sizes, dim=-1)
        with _taping(on.attention):
            q, gates = self.q_proj(x, route), [getattr(self, name)(x, route) for name in self.gates]
        with _taping(on.attention or on.written):
            return q, self.k_proj(x, route), self.v_proj(x, route), *gates

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up_proj = Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down_proj = Linear(config.mlp_width, config.width, bias=config.mlp_bias)
        self.joined: Joined | None = None

    def forward(self, x: Tensor, route: Route | None, taped: bool = True) -> Tensor:
        if self.joined is not None:
            return self.down_proj(gated(self.joined(self, x, route)), route)
        with _taping(taped):
            gate = nn.functional.silu(self.gate_proj(x, route))
            return self.down_proj(gate * self.up_proj(x, route), route)


class Block(nn.Module):
    """Two residual branches: attention, then the MLP."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        attend: Attend,
        route: Route | None,
        on: Branches = BOTH,
        again: bool = False,
    ) -> Tensor:
        """``again``: what is on the tape is computed once more in the backward pass instead of being kept."""

        def attended(x: Tensor) -> Tensor:
            return x + self.self_attn(self.input_layernorm(x), angles, attend, route, on)

        def fed(x: Tensor) -> Tensor:
            return x + self.mlp(self.post_attention_layernorm(x), route, on.mlp)

        if not again:
            return fed(attended(x))
        if on.attention and on.mlp:
            return self._twice(lambda x: fed(attended(x)), x)
        # A branch without a tape keeps nothing and need not be run twice.
        x = self._twice(attended, x) if on.attention or on.written else attended(x)
        return self._twice(fed, x) if on.mlp else fed(x)

    def _twice(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Once now and once more in the backward pass, when nobody counts what was counted."""
        again = self.self_attn.uncounted()
        made: Tensor = checkpoint(run, x, use_reentrant=False, context_fn=lambda: (nullcontext(), again))
        return made

    def linears(self) -> Iterator[tuple[nn.Module, str]]:
        """(parent, name) of each Linear, in the kernel's order."""
        for name in LINEARS:
            yield self.self_attn if hasattr(self.self_attn, name) else self.mlp, name

    def weights(self, *, looked_up: bool) -> Weights:
        """Of a joined block; ``looked_up``: of Linears in codebooks the codes, else their dense copies."""
        attention, mlp = self.self_attn, self.mlp
        assert attention.joined is not None and mlp.joined is not None
        dtype = self.input_layernorm.weight.dtype
        pieces = partial(piece_of, dtype=dtype, looked_up=looked_up)
        parts = {
            "input_norm": self.input_layernorm.weight,
            "q_norm": getattr(attention.q_norm, "weight", None),
            "k_norm": getattr(attention.k_norm, "weight", None),
            "post_norm": self.post_attention_layernorm.weight,
            "sinks": getattr(attention, "sinks", None),
            "average": getattr(attention, "alpha_ma", None),
        }
        products = {
            "qkv": attention.joined.pieces(attention, dtype, looked_up=looked_up),
            "o": [pieces(plain_linear(attention.o_proj))],
            "gate_up": mlp.joined.pieces(mlp, dtype, looked_up=looked_up),
            "down": [pieces(plain_linear(mlp.down_proj))],
        }
        return Weights({name: None if own is None else own.detach() for name, own in parts.items()}, products)


class Decoder(nn.Module):
    """Embedding, blocks and the last norm (Hugging Face's ``model.``)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)


class Transformer(nn.Module):
    """A dense decoder-only model of the Llama skeleton. ``checkpointing`` recomputes blocks in the backward pass."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.at_once: Blocks | ByRows | None = None
        """All blocks in one call, for passes over pages (``join``); the loop is its twin."""
        self.turned: Turned | None = None
        self.wardrobe = Wardrobe()
        self.model = Decoder(config)
        self.lm_head = Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.angle_scale = inverse_frequencies(config.rope, config.head_width)[1]
        self.frequencies: Tensor
        self.register_buffer("frequencies", self.rotary(config), persistent=False)

    @staticmethod
    def rotary(config: ModelConfig) -> Tensor:
        """Rotary frequencies [D/2] float32: computed, never loaded."""
        return inverse_frequencies(config.rope, config.head_width)[0]

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Attend,
        route: Route | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        """Hidden states [..., E] after the last norm, for token ``ids`` [...] at ``positions`` [...] (int64).

        ``tape``: which branches carry gradient; all where it is left out. What is computed is the same.
        """
        x = self.model.embed_tokens(ids)
        laid = getattr(attend, "laid", None)
        worn = self.wardrobe(route, self._linears, x.dtype, rows=x.shape[0]) if laid is not None else None
        if (
            laid is not None
            and worn is not None
            and self.at_once is not None
            and self.turned is not None
            and self.at_once.serves(x, laid)
        ):
            self.at_once(x, self.turned(positions, self.frequencies, x.dtype), laid, worn)
            return self.model.norm(x)
        angles = cos_sin(positions, self.frequencies, self.angle_scale, x.dtype)
        again = self.checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.model.layers):
            x = block(x, angles, attend, route, tape[layer] if tape else BOTH, again)
        return self.model.norm(x)

    def join(self) -> None:
        """For serving: Linears of one input run as one. Their weights become views of one tensor; none is added.

        Linears in codebooks are laid out when codes are first looked up, and copied densely when more rows come than
        looking up is good for; both are kept.
        """
        for block in self.blocks:
            attention, mlp = block.self_attn, block.mlp
            sides = ("q_proj", "k_proj", "v_proj", *attention.gates)
            attention.joined = attention.joined or Joined(attention, sides)
            mlp.joined = mlp.joined or Joined(mlp, ("gate_proj", "up_proj"))
        if native.built() and self.device.type == "cpu":
            self.at_once = self.at_once or self._blocks_at_once()
            self.turned = self.turned or Turned(self.angle_scale)

    def _blocks_at_once(self) -> Blocks | ByRows:
        blocks, config = (
            self.blocks,
            self.config,
        )  # what is made later must not hold the model: that were a circle

        def made(looked_up: bool) -> Blocks:
            weights, kind = [block.weights(looked_up=looked_up) for block in blocks], config.attention
            extras = Extras(kind.affine, kind.length or 0, kind.learned, kind.gated)
            return Blocks(weights, heads=config.heads, eps=config.norm_eps, extras=extras)

        if not (coded := [part.product for part in coded_linears(self).values()]):
            return made(False)
        rows = rows_looked_up(coded, self.dtype)
        return ByRows(rows, looked_up=partial(made, True), dense=partial(made, False))

    def _linears(self) -> list[nn.Module]:
        """Those of all blocks that may wear adapters, in the kernel's order."""
        return [getattr(part, name) for block in self.blocks for part, name in block.linears()]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., E]."""
        return self.lm_head(hidden)

    @property
    def blocks(self) -> list[Block]:
        return [block for block in self.model.layers if isinstance(block, Block)]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device
