"""Some columns of a weight, tuned, as a way to be a Linear (PaCA, arXiv 2503.01905): what is trained, kept and run.

One part, two forms of the same function y = x W^T + x[..., I] D^T. In *delta form* the weight is left alone, so that it
may serve others in the same step. *Resident*, the columns W[:, I] + D stand in the weight itself and are written anew
only when D has changed: once an optimizer step. Both keep x[..., I] for the backward pass, and never x.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from heliostat.errors import Refused
from heliostat.ops.linear import linear

STEPS = "optimizer_steps"
"""Attribute of D that counts optimizer steps: fused ones change a tensor without telling its version."""


def _count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if STEPS in parameter.__dict__:
                parameter.__dict__[STEPS] += 1


register_optimizer_step_post_hook(_count)


class Gather:
    """x[..., I] for all Linears that read one input: gathered by whoever comes first, then handed on."""

    def __init__(self) -> None:
        self._seen: tuple[weakref.ref[Tensor], int, torch.dtype, bool] | None = None
        self._kept: weakref.ref[Tensor] | None = None

    def __call__(self, x: Tensor, columns: Tensor) -> Tensor:
        """x [..., in] -> [..., r], in the number format that products have here."""
        kind = _product_dtype(x)
        if torch.compiler.is_compiling() or x.is_inference():  # neither has tensors that could be told apart
            return x.index_select(-1, columns).to(kind)
        kept = self._kept() if self._kept is not None else None
        if kept is not None and self._seen is not None:
            seen, *facts = self._seen
            if seen() is x and facts == [x._version, kind, torch.is_grad_enabled()]:
                return kept
        kept = x.index_select(-1, columns).to(kind)
        # What was gathered off the tape carries no gradient to x, so that it is no good for who is on it.
        self._seen = (weakref.ref(x), x._version, kind, torch.is_grad_enabled())
        self._kept = weakref.ref(kept)
        return kept

    def __deepcopy__(self, memo: dict[int, Any]) -> Gather:
        return memo.setdefault(id(self), Gather())


class Columns(nn.Module):
    """One adapter: D [out, r] is added to the columns I [r] of a weight [out, in]; zero at the start.

    D is trained in its own number format (float32) whatever the weight's is, and weight decay draws it to zero, the
    columns to what they were.
    """

    columns: Tensor
    originals: Tensor | None

    def __init__(self, outputs: int, columns: Tensor, gather: Gather | None = None) -> None:
        """``gather`` is shared by the Linears of one input; their ``columns`` must be equal."""
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(outputs, columns.numel()))
        self.register_buffer("columns", columns)
        self.register_buffer("originals", None, persistent=False)  # W[:, I] while others stand in their place
        self.gather = gather or Gather()
        self._written: tuple[int, ...] | None = None

    @property
    def resident(self) -> bool:
        """Whether the columns stand in the weight."""
        return self.originals is not None

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the Linear's product: [..., in] -> [..., out], in the number format of products."""
        picked = self.gather(x, self.columns)
        return linear(picked, self.delta.to(picked.dtype))

    def through(self, inner: nn.Module, x: Tensor) -> Tensor:
        """The tuned Linear: x [..., in] -> [..., out]. ``inner`` is the frozen one, whatever it multiplies by."""
        if self.resident:
            if not torch.compiler.is_compiling():  # compiled, whoever runs the whole model has done so
                self.refresh(inner)
            if not torch.is_grad_enabled():
                return inner(x)
        elif not is_dense(inner) or not torch.is_grad_enabled():
            return inner(x) + self(x)
        with torch.no_grad():
            picked = self.gather(x, self.columns)
        return _Tuned.apply(x, inner.weight, inner.bias, self.delta, self.columns, picked, self.resident)

    @torch.no_grad()
    def settle(self, inner: nn.Module) -> None:
        """Let the columns stand in the weight; Refused where there is none that could take them."""
        if not is_dense(inner):
            raise Refused(
                f"{type(inner).__name__} has no dense weight to write columns into: keep them beside it (form='delta')"
            )
        assert isinstance(inner, nn.Linear)
        if not self.resident:
            self.originals = inner.weight.detach().index_select(1, self.columns)
        self._written = None
        self.refresh(inner)

    @torch.no_grad()
    def refresh(self, inner: nn.Module, *, unseen: bool = False) -> None:
        """Write the columns anew where D has changed since they were written; cheap where it has not.

        ``unseen``: write them whatever is known of D; who writes to its ``data`` leaves no trace.
        """
        if self.originals is None:
            return
        assert isinstance(inner, nn.Linear)
        steps = self.delta.__dict__.setdefault(STEPS, 0)
        state = (steps, self.delta._version, self.delta.data_ptr(), inner.weight.data_ptr())
        if unseen or state != self._written:
            inner.weight.index_copy_(1, self.columns, (self.originals + self.delta).to(inner.weight.dtype))
            self._written = state

    @torch.no_grad()
    def lift(self, inner: nn.Module) -> None:
        """Put the pretrained columns back, bit by bit; what was tuned stays in D."""
        if self.originals is None:
            return
        assert isinstance(inner, nn.Linear)
        inner.weight.index_copy_(1, self.columns, self.originals)
        self.originals = None

    def extra_repr(self) -> str:
        return f"r={self.columns.numel()}, {'resident' if self.resident else 'delta form'}"


def is_dense(inner: nn.Module) -> bool:
    """Whether a Linear multiplies by a plain tensor, which can be read and written column by column."""
    weight = inner._parameters.get("weight") if isinstance(inner, nn.Linear) else None
    return weight is not None and weight.is_floating_point()


def _product_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Tuned(torch.autograd.Function):
    """The tuned Linear on the tape. Kept for the backward pass: x[..., I], and what lives anyway (weight, D, I)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        delta: Tensor,
        columns: Tensor,
        picked: Tensor,
        resident: bool,
    ) -> Tensor:
        y = functional.linear(x, weight, bias)
        if not resident:
            y.view(-1, y.shape[-1]).addmm_(picked.reshape(-1, picked.shape[-1]), delta.to(y.dtype).t())
        ctx.resident, ctx.kind = resident, x.dtype
        ctx.save_for_backward(weight, delta, columns, picked if ctx.needs_input_grad[3] else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, delta, columns, picked = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        to_x = to_bias = to_delta = None
        if ctx.needs_input_grad[0]:
            to_x = rows @ weight.to(rows.dtype)
            if not ctx.resident:
                to_x.index_add_(1, columns, rows @ delta.to(rows.dtype))
            to_x = to_x.view(*grad.shape[:-1], -1).to(ctx.kind)
        if ctx.needs_input_grad[2]:
            to_bias = rows.sum(0)
        if picked is not None:
            to_delta = (rows.t() @ picked.reshape(-1, picked.shape[-1])).to(delta.dtype)
        return to_x, None, to_bias, to_delta, None, None, None
