"""What a block's attention has beside softmax: alpha and its moving average, a gate, sinks. Part of ``Attention``.

Affine-scaled attention is that of arXiv 2602.23057; alpha is clip(0.1 x W + 0.5, 0, 1), one number a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from heliostat.linear.lora import Linear
from heliostat.model.config import ModelConfig
from heliostat.ops.mixing import Mix

RHO = 0.9
"""Share of the average that stays at an optimizer step."""
SLOPE, MIDDLE = 0.1, 0.5
KEPT_WHOLE = ("alpha_ma",)
"""Last names of tensors that stay float32 in every number format."""


def format_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The number format of a tensor in a checkpoint or a model of ``dtype``: averages stay float32."""
    return torch.float32 if name.endswith(KEPT_WHOLE) else dtype


class Weighing(nn.Module):
    """How the heads of one block weigh what they read. Everything learned here starts at zero.

    ``alpha_ma`` [H] is the moving average of alpha, a buffer of the checkpoint. In training mode, where gradients are
    wanted, what alpha was is remembered until ``settle`` moves it; nothing else ever does.
    """

    alpha_ma: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind, heads = config.attention, config.heads
        self.gates: tuple[str, ...] = ()
        """Linears from the block's input to one number a head, by name."""
        if self.kind.learned:
            self.alpha_proj, self.gates = Linear(config.width, heads, bias=False), ("alpha_proj",)
        if self.kind.gated:
            self.head_gate, self.gates = Linear(config.width, heads, bias=False), (*self.gates, "head_gate")
        if self.kind.sink:
            self.sinks = nn.Parameter(torch.zeros(heads))
        if self.kind.affine:
            self.register_buffer("alpha_ma", torch.zeros(heads))
        for name in self.gates:
            nn.init.zeros_(getattr(self, name).weight)
        self._counting = True
        self._seen: Tensor | None = None  # [H + 1] sums of alpha by head, and over how many tokens

    def mix(self, gates: Sequence[Tensor]) -> Mix:
        """``gates``: what the Linears of that name made of the input, [..., H] each."""
        found = dict(zip(self.gates, gates, strict=True))
        sinks = self.sinks if self.kind.sink else None
        if not self.kind.affine:
            return Mix(gate=found.get("head_gate"), sinks=sinks)
        return Mix(self._alpha(found), self.alpha_ma, self.kind.length, found.get("head_gate"), sinks)

    def _alpha(self, found: dict[str, Tensor]) -> Tensor:
        """[..., H] float32, or [H] where it is constant."""
        logits = found.get("alpha_proj")
        if logits is None:
            alpha = torch.full_like(self.alpha_ma, MIDDLE)
        else:
            alpha = (SLOPE * logits.float() + MIDDLE).clamp(0, 1)
        if self.training and self._counting and torch.is_grad_enabled():
            self._remember(alpha.detach().view(-1, alpha.shape[-1]))
        return alpha

    def _remember(self, alpha: Tensor) -> None:
        count = alpha.new_full((1,), alpha.shape[0])
        seen = torch.cat([alpha.sum(0), count]).double()
        self._seen = seen if self._seen is None else self._seen + seen

    def uncounted(self) -> Uncounted:
        """Where a block runs a second time for its backward pass."""
        return Uncounted(self)

    def take_seen(self) -> Tensor:
        """[H + 1] float64: alpha's sums since it was taken last, and over how many tokens; then forgotten."""
        seen, self._seen = self._seen, None
        none = self.alpha_ma.new_zeros(self.alpha_ma.shape[0] + 1, dtype=torch.float64)
        return none if seen is None else seen

    @torch.no_grad()
    def move(self, seen: Tensor) -> None:
        """One step of the average, by what ``take_seen`` gave; none where no token was seen."""
        if seen[-1] > 0:
            mean = (seen[:-1] / seen[-1]).to(self.alpha_ma.dtype)
            self.alpha_ma.mul_(RHO).add_(mean, alpha=1 - RHO)


class Uncounted:
    """While it is entered, what alpha is in a block is not remembered."""

    def __init__(self, block: Weighing) -> None:
        self._block = block

    def __enter__(self) -> None:
        self._block._counting = False

    def __exit__(self, *why: object) -> None:
        self._block._counting = True


def settle(model: nn.Module, add_up: Callable[[Tensor], Tensor] = lambda seen: seen) -> None:
    """Move every moving average of a model once: after an optimizer step, whatever the number of its micro-batches.

    ``add_up``: sums a tensor over all processes that take the step together. Does nothing where there is no average.
    """
    blocks = [part for part in model.modules() if isinstance(part, Weighing) and part.kind.affine]
    if not blocks:
        return
    seen = add_up(torch.stack([block.take_seen() for block in blocks]))
    for block, own in zip(blocks, seen, strict=True):
        block.move(own)
