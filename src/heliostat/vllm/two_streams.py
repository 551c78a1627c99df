"""Models of vLLM whose weights write keys and values, and whose adapters speak (arXiv 2603.13281; docs/methods/icarus.md).

Rows of a pass are the tokens that write, and behind them, once more, those after which somebody speaks. Each product with
a weight is one for both; adapters are added to the rows that speak. Only rows that write go into the cache; both read it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from heliostat.errors import Refused


def speaking_rows(count: int, device: torch.device) -> Tensor | None:
    """Rows [S] of a pass of ``count`` tokens after which somebody may speak: each request's last. None: all of them."""
    metadata = get_forward_context().attn_metadata
    if metadata is None:  # vLLM tries how much memory a pass takes
        return None
    facts = next(iter(metadata.values()))
    rows = (facts.query_start_loc[1:] - 1).clamp(min=0)
    return None if len(rows) == count else rows.to(device).long()


class Pass:
    """One pass of two streams: which rows speak, and how adapters get to them."""

    def __init__(self, positions: Tensor, rows: Tensor | None) -> None:
        self.count, self.rows = positions.shape[0], rows
        self.positions = torch.cat([positions, positions if rows is None else positions[rows]])

    def doubled(self, x: Tensor) -> Tensor:
        """[T, E] -> [T + S, E]."""
        return torch.cat([x, x if self.rows is None else x[self.rows]])

    def spread(self, x: Tensor) -> Tensor:
        """[S, ...] -> [T, ...]: what speaks at its own row, nothing at the others."""
        if self.rows is None:
            return x
        return x.new_zeros(self.count, *x.shape[1:]).index_copy_(0, self.rows, x)

    def product(self, linear: nn.Module, x: Tensor) -> Tensor:
        """Of all rows [T + S, in] with the weight; of the rows that speak with their adapters, too."""
        inner: Any = getattr(linear, "base_layer", linear)
        row = isinstance(inner, RowParallelLinear)
        bias = None if row and get_tensor_model_parallel_rank() > 0 else inner.bias
        y: Tensor = inner.quant_method.apply(inner, x, bias)
        if inner is not linear:
            self._adapt(linear, x[self.count :], y[self.count :])
        return tensor_model_parallel_all_reduce(y) if row and inner.tp_size > 1 else y

    def _adapt(self, linear: Any, x: Tensor, y: Tensor) -> None:
        """vLLM knows the adapter of each row that writes, so it is asked about rows laid out as those."""
        out = y if self.rows is None else y.new_zeros(self.count, y.shape[1])
        a, b = linear.lora_a_stacked, linear.lora_b_stacked
        linear.punica_wrapper.add_lora_linear(
            out, self.spread(x).contiguous(), a, b, 1.0, linear.output_slices
        )
        if self.rows is not None:
            y += out[self.rows]

    def attend(self, block: Any, x: Tensor) -> Tensor:
        """What both streams read: [T + S, E] -> [T + S, E]. Those that speak find their own position written, too."""
        q, k, v = self.product(block.qkv_proj, x).split([block.q_size, block.kv_size, block.kv_size], dim=-1)
        if hasattr(block, "q_norm"):
            q, k = _by_head(block.q_norm, q, block.head_dim), _by_head(block.k_norm, k, block.head_dim)
        q, k = block.rotary_emb(self.positions, q.contiguous(), k.contiguous())
        t = self.count
        written = block.attn(q[:t], k[:t], v[:t].contiguous())
        spoken = block.attn(self.spread(q[t:]).contiguous(), None, None)
        if self.rows is not None:
            spoken = spoken[self.rows]
        return self.product(block.o_proj, torch.cat([written, spoken]))

    def run(self, model: Any, x: Tensor) -> Tensor:
        """Hidden states [T, E] out of embeddings [T, E]; right where somebody speaks, nothing elsewhere."""
        x, rest = self.doubled(x), None
        for layer in model.layers:
            if rest is None:
                rest, x = x, layer.input_layernorm(x)
            else:
                x, rest = layer.input_layernorm(x, rest)
            x, rest = layer.post_attention_layernorm(self.attend(layer.self_attn, x), rest)
            mlp = layer.mlp
            x = self.product(mlp.down_proj, mlp.act_fn(self.product(mlp.gate_up_proj, x)))
        assert rest is not None
        x, _ = model.norm(x[self.count :].contiguous(), rest[self.count :].contiguous())
        return self.spread(x)


def _by_head(norm: nn.Module, x: Tensor, width: int) -> Tensor:
    normed: Tensor = norm(x.reshape(*x.shape[:-1], -1, width).contiguous())
    return normed.view(x.shape)


def _refuse_unable(vllm_config: Any) -> None:
    if not vllm_config.model_config.enforce_eager:
        raise Refused("two streams run without graphs: give vLLM --enforce-eager")
    if get_pp_group().world_size > 1:
        raise Refused("two streams do not run in stages: give vLLM no --pipeline-parallel-size")
    if vllm_config.speculative_config is not None:
        raise Refused("two streams do not speculate: give vLLM no --speculative-config")


class TwoStreams:
    """What is added to a model of vLLM; stands before it among the parents."""

    model: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        _refuse_unable(vllm_config)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """See ``Pass.run``."""
        x = self.model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return Pass(positions, speaking_rows(x.shape[0], x.device)).run(self.model, x)


class HeliostatTwoStreamLlama(TwoStreams, LlamaForCausalLM):
    """Llama."""


class HeliostatTwoStreamQwen2(TwoStreams, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5."""


class HeliostatTwoStreamQwen3(TwoStreams, Qwen3ForCausalLM):
    """Qwen3."""
