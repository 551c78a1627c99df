"""Backward passes that leave out whole residual branches: DropBP, arXiv 2402.17812.

The forward pass is exact. Which branches are dropped is decided before it, so that a dropped one runs without a tape:
no graph, nothing kept. Rates are uniform for the first tenth of a run; then the branches' sensitivities are measured
once, on one example, and say who is dropped how often (``train.droprates``).

A parameter whose branches are all dropped has no gradient in that step: AdamW leaves it alone, its decay and its
moments, too. The draw is the same on every rank, so it is the same parameters everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from heliostat.errors import Refused
from heliostat.files import atomic_write_text, read_json
from heliostat.model.config import ModelConfig
from heliostat.model.transformer import Branches, Tape
from heliostat.plot import lines
from heliostat.train.droprates import Branch, by_sensitivity, check_rate, draw, dropped_share, uniform
from heliostat.train.ranks import whole
from heliostat.train.wrapping import Wrapped, wrap

__all__ = ["Dropping", "Wrapped", "branches_of", "gradient_norms", "sensitivities", "wrap"]

RATES, PICTURE = "dropbp.json", "dropbp.svg"
UNIFORM_SHARE = 0.1
"""Share of a run in which all rates are the same; then sensitivities are measured."""
ATTENTION, MLP = "attention", "mlp"
_PARTS = {ATTENTION: ("self_attn", "input_layernorm"), MLP: ("mlp", "post_attention_layernorm")}

Losing = Callable[[Tape | None], Tensor]
"""The loss (a scalar, with a tape) of one example, with the branches of a tape; None: with all."""


class Dropping:
    """Rates and draws of one run."""

    def __init__(
        self,
        branches: Sequence[Branch],
        rate: float,
        *,
        seed: int,
        measured_at: int | None,
        folder: Path | None = None,
        written: bool = False,
        writes: bool = True,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """``measured_at``: the step before which sensitivities are measured; None: rates stay uniform.

        ``folder``: where rates are written, and read when a run goes on behind that step. ``written``: keys and values
        are read by another module and stay on the tape. ``writes``: whether this process writes the files.
        Raises Refused for a rate outside [0, 0.95].
        """
        self.branches, self.rate, self.seed = tuple(branches), check_rate(rate), seed
        self.measured_at, self.folder, self.written = measured_at, folder, written
        self.writes, self.tell = writes, tell
        self.rates = uniform(self.branches, rate)
        self.measured = False

    def tape(self, step: int, losing: Losing, parameters: Mapping[str, nn.Parameter]) -> Tape:
        """What is on the tape in an optimizer step (0-based); measures first where this is the step for it."""
        if self.measured_at is not None and step >= self.measured_at and not self.measured:
            if step == self.measured_at:
                self.measure(losing, parameters)
            else:
                self._read(step)
        return self.tape_of(draw(self.branches, self.rates, seed=self.seed, step=step))

    def tape_of(self, kept: Sequence[bool]) -> Tape:
        """The tape on which these branches are."""
        on = {(b.layer, b.kind): keep for b, keep in zip(self.branches, kept, strict=True)}
        layers = 1 + max(b.layer for b in self.branches)
        return tuple(Branches(on[n, ATTENTION], on[n, MLP], self.written) for n in range(layers))

    def measure(self, losing: Losing, parameters: Mapping[str, nn.Parameter]) -> None:
        """Set rates by sensitivity; costs a forward and a backward pass of one example for every branch and one more.

        Leaves no gradient and takes nothing from any generator.
        """
        every = [True] * len(self.branches)

        def norms(dropped: int | None) -> dict[str, float]:
            kept = [keep and i != dropped for i, keep in enumerate(every)]
            return gradient_norms(losing(self.tape_of(kept)), parameters)

        self.settle(sensitivities(norms, len(self.branches)))

    def settle(self, found: Sequence[float]) -> None:
        """Take the rates that these sensitivities come to; say, write and draw them."""
        self.rates = by_sensitivity(self.branches, found, self.rate, seed=self.seed)
        self.measured = True
        share = dropped_share(self.branches, self.rates)
        where = ""
        if self.folder is not None and self.writes:
            facts = {
                "rate": self.rate,
                "dropped": share,
                "rates": {b.name: r for b, r in zip(self.branches, self.rates, strict=True)},
                "sensitivities": {b.name: s for b, s in zip(self.branches, found, strict=True)},
            }
            atomic_write_text(self.folder / RATES, json.dumps(facts, indent=1) + "\n")
            atomic_write_text(self.folder / PICTURE, self.picture())
            where = f"; {self.folder / PICTURE}"
        low, high = min(self.rates), max(self.rates)
        self.tell(
            f"dropbp {self.rate:g}: rates by sensitivity, {low:.2f} to {high:.2f}, {share:.1%} of the branches' "
            f"backward pass dropped{where}"
        )

    def picture(self) -> str:
        """The rates by layer, as SVG."""
        series = {
            kind: [(b.layer, r) for b, r in zip(self.branches, self.rates, strict=True) if b.kind == kind]
            for kind in (ATTENTION, MLP)
        }
        title = f"How often each branch is dropped, dropbp {self.rate:g}"
        return lines(series, title=title, x="layer", y="rate", y_from_zero=True)

    def _read(self, step: int) -> None:
        """The rates that this run measured before it was interrupted."""
        if self.folder is None or not (self.folder / RATES).is_file():
            raise Refused(
                f"{self.folder}: {RATES} is missing, with the rates that this run measured before step {step}; "
                "start over with --resume-from-checkpoint false"
            )
        facts = read_json(self.folder / RATES)
        try:
            self.rates = tuple(float(facts["rates"][b.name]) for b in self.branches)
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"{self.folder / RATES} is damaged: {error!r}") from error
        self.measured = True


def sensitivities(norms: Callable[[int | None], Mapping[str, float]], count: int) -> list[float]:
    """Of each branch: sum over parameters of the squared change of the gradient's norm when it alone is dropped.

    ``norms``: gradient norms by parameter with one branch dropped, or with none.
    """
    whole = norms(None)
    found = []
    for branch in range(count):
        without = norms(branch)
        found.append(sum((n - without.get(name, 0.0)) ** 2 for name, n in whole.items()))
    return found


def gradient_norms(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
    """Norms of a loss's gradients by parameter, those that have one; the gradients themselves are gone afterwards."""
    assert all(p.grad is None for p in parameters.values()), "a step's gradients would be lost"
    if loss.requires_grad:
        loss.backward()
    found = {name: _norm(p.grad) for name, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    return found


def _norm(gradient: Tensor) -> float:
    return float(whole(gradient.float().norm()))


def branches_of(
    config: ModelConfig, trained: Iterable[str], *, whole: bool, writes_for_itself: bool, context: float
) -> tuple[Branch, ...]:
    """The branches of a model and what their backward passes cost a token, in multiply-adds.

    ``trained``: names of the parameters that are. ``whole``: all weights are trained, so that every product has two
    backwards, by input and by weight; frozen ones have one. ``writes_for_itself``: keys and values go with their
    branch; else they stay on the tape or never are on it. ``context``: positions that a query sees, on average.
    """
    names = list(trained)
    sizes = {name: a * b for name, (a, b) in config.linears.items()}
    attended = [n for n in ("q_proj", "k_proj", "v_proj", "o_proj") if writes_for_itself or n[0] in "qo"]
    products = 2 if whole else 1
    scores = 4 * config.heads * config.head_width * context  # queries, keys, values and weights of attention
    flops = {
        ATTENTION: products * sum(sizes[n] for n in attended) + scores,
        MLP: products * sum(sizes[n] for n in ("gate_proj", "up_proj", "down_proj")),
    }
    return tuple(
        Branch(layer, kind, flops[kind], any(_lies_in(n, layer, kind) for n in names))
        for layer in range(config.layers)
        for kind in (ATTENTION, MLP)
    )


def _lies_in(name: str, layer: int, kind: str) -> bool:
    return any(f"layers.{layer}.{part}." in name for part in _PARTS[kind])
