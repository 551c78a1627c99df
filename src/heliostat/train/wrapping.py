"""DropBP (arXiv 2402.17812) on a model of transformers, under any trainer; reached as ``heliostat.train.dropbp.wrap``.

A branch's module runs without a tape where its branch is dropped; its norm runs as before, and what was kept for it
goes at once. Every step of an optimizer that holds the model's parameters brings the next draw, so micro-batches of
one step share theirs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from heliostat.errors import Refused
from heliostat.train.droprates import Branch, by_sensitivity, check_rate, draw, dropped_share, uniform
from heliostat.train.sharing import DROPPED, InRow

KNOWN = (
    (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")),
    (("ln_1", "attn"), ("ln_2", "mlp")),
)
"""What a layer consists of whose residual branches we know: norm and body of attention, norm and body of the MLP."""
ATTENTION, MLP = "attention", "mlp"
UNIFORM_SHARE = 0.1


class Wrapped:
    """A model whose residual branches are dropped in the backward pass, until `undo`."""

    def __init__(self, model: nn.Module, rate: float, *, steps: int | None, seed: int, length: int) -> None:
        self.model, self.rate, self.steps, self.seed = model, check_rate(rate), steps, seed
        self.step, self.measured = 0, False
        if isinstance(model, InRow):
            raise Refused(
                "dropbp: a model that sharing.wrap put into a row cannot drop branches; heliostat train --sharing ... "
                "--dropbp ... can"
            )
        layers = _layers(model)
        self.branches = tuple(
            branch
            for number, (layer, pairs) in enumerate(layers)
            for branch in _branches(number, layer, pairs, _scores(model, length))
        )
        self.rates = uniform(self.branches, rate)
        self._bodies = [layer.get_submodule(body) for layer, pairs in layers for _, body in pairs]
        for place, body in enumerate(self._bodies):
            self._bind(body, place)
        setattr(model, DROPPED, True)
        self._own = {id(p) for p in model.parameters()}
        self._sample: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._hooks = [
            register_optimizer_step_post_hook(self._stepped),
            model.register_forward_pre_hook(self._see, with_kwargs=True),
        ]
        self.kept = self._draw()

    def begin(self, step: int, steps: int | None = None) -> None:
        """Say which optimizer step comes next (0-based), and of how many; a trainer that goes on must (see `callback`)."""
        self.step, self.steps = step, steps or self.steps
        due = self.steps is not None and step >= max(1, round(UNIFORM_SHARE * self.steps))
        if due and self.rate and not self.measured and self._sample is not None:
            self._measure_sample()
        self.kept = self._draw()

    def measure(self, loss: Callable[[], Tensor]) -> None:
        """Set rates by sensitivity from the loss of one example; leaves gradients and generators as they were."""
        found = []
        with self._aside():
            whole = self._norms(loss, None)
            for branch in range(len(self.branches)):
                without = self._norms(loss, branch)
                found.append(sum((n - without.get(name, 0.0)) ** 2 for name, n in whole.items()))
        self.rates = by_sensitivity(self.branches, found, self.rate, seed=self.seed)
        self.measured = True
        self.kept = self._draw()

    @property
    def dropped(self) -> float:
        """Share of the branches' backward FLOPs that is dropped."""
        return dropped_share(self.branches, self.rates)

    @property
    def callback(self) -> Any:
        """For a transformers or TRL trainer: tells steps and their number, so that sensitivities are measured."""
        from transformers import TrainerCallback

        wrapped = self

        class Steps(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                wrapped.begin(state.global_step, state.max_steps)

        return Steps()

    def undo(self) -> nn.Module:
        """The model as it was."""
        for body in self._bodies:
            body.__dict__.pop("forward", None)
        for hook in self._hooks:
            hook.remove()
        setattr(self.model, DROPPED, False)
        return self.model

    def _bind(self, body: nn.Module, place: int) -> None:
        inner = body.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.kept[place] or not torch.is_grad_enabled():
                return inner(*args, **kwargs)
            with torch.no_grad():
                return inner(*args, **kwargs)

        body.forward = forward

    def _draw(self) -> tuple[bool, ...]:
        return draw(self.branches, self.rates, seed=self.seed, step=self.step)

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(id(p) in self._own for group in optimizer.param_groups for p in group["params"]):
            self.begin(self.step + 1)

    def _see(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember one example of the latest batch, to measure sensitivities with."""
        if torch.is_grad_enabled() and model.training and not self.measured:
            self._sample = (tuple(map(_first, args)), {name: _first(x) for name, x in kwargs.items()})

    def _measure_sample(self) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            warnings.warn("dropbp: in several processes rates stay uniform", stacklevel=2)
            self.measured = True
            return
        assert self._sample is not None
        args, kwargs = self._sample
        found = self.model(*args, **kwargs)
        if getattr(found, "loss", None) is not None and not found.loss.isfinite():
            return  # a row without a single label: the next batch has another
        if getattr(found, "loss", None) is None:
            raise Refused(
                "dropbp: the model returns no loss to measure sensitivities with; give its labels, call "
                "measure(loss) yourself, or leave steps out: rates stay uniform"
            )
        self.measure(lambda: self.model(*args, **kwargs).loss)

    def _norms(self, loss: Callable[[], Tensor], dropped: int | None) -> dict[str, float]:
        self.kept = tuple(i != dropped for i in range(len(self.branches)))
        torch.manual_seed(self.seed)  # dropout falls alike in every pass
        value = loss()
        if value.requires_grad:
            value.backward()
        found = {
            n: float(p.grad.float().norm()) for n, p in self.model.named_parameters() if p.grad is not None
        }
        for parameter in self.model.parameters():
            parameter.grad = None
        return found

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Gradients and generators are as before at the end."""
        parameters = list(self.model.parameters())
        before = [p.grad for p in parameters]
        devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
        for parameter in parameters:
            parameter.grad = None
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def wrap(
    model: nn.Module, *, rate: float, steps: int | None = None, seed: int = 0, length: int = 512
) -> Wrapped:
    """Drop residual branches of a transformers model in the backward pass: ``rate`` of their FLOPs, in every step.

    ``steps``: optimizer steps of the run: after a tenth of them sensitivities set the rates; None: they stay uniform,
    unless a trainer tells by `Wrapped.callback`. ``length``: tokens of a usual row, by which attention's cost is
    reckoned. Raises Refused for a rate outside [0, 0.95] and for layers whose residual branches are not known.
    """
    return Wrapped(model, rate, steps=steps, seed=seed, length=length)


def _layers(model: nn.Module) -> list[tuple[nn.Module, tuple[tuple[str, str], ...]]]:
    found: list[tuple[nn.Module, tuple[tuple[str, str], ...]]] = []
    for module in model.modules():
        children = {name for name, _ in module.named_children()}
        for pairs in KNOWN:
            if children == {name for pair in pairs for name in pair} and not _routed(module):
                found.append((module, pairs))
    if not found:
        kinds = " or ".join(", ".join(name for pair in pairs for name in pair) for pairs in KNOWN)
        raise Refused(
            f"dropbp: {type(model).__name__} has no layers whose residual branches are known (of {kinds}, nothing else)"
        )
    return found


def _routed(layer: nn.Module) -> bool:
    """Whether a mixture of experts sits in the layer: its router learns by other ways than the branch's output."""
    return any(name.rsplit(".", 1)[-1] in ("experts", "router") for name, _ in layer.named_modules())


def _branches(
    number: int, layer: nn.Module, pairs: tuple[tuple[str, str], ...], scores: float
) -> Iterator[Branch]:
    for kind, (norm, body) in zip((ATTENTION, MLP), pairs, strict=True):
        weights = list(layer.get_submodule(body).parameters())
        flops = sum(p.numel() * (2 if p.requires_grad else 1) for p in weights if p.dim() > 1)
        trained = any(p.requires_grad for p in (*weights, *layer.get_submodule(norm).parameters()))
        yield Branch(number, kind, flops + (scores if kind == ATTENTION else 0.0), trained)


def _scores(model: nn.Module, length: int) -> float:
    """Multiply-adds a token of attention's own products, backward; a query sees half of a row on average."""
    width = getattr(getattr(model, "config", None), "hidden_size", 0)
    return 4.0 * width * length / 2


def _first(value: Any) -> Any:
    """The first row of a batch's tensor; anything else as it is."""
    return value[:1] if isinstance(value, Tensor) and value.dim() else value
