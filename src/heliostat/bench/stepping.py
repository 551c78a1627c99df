"""One way of tuning on one model, ready to step: for measuring time, what is kept for the backward pass, and memory.

All ways run on the same transformer, PEFT's adapters too, so that nothing but the tuner differs.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from heliostat.errors import Refused
from heliostat.linear.choice import add_columns
from heliostat.linear.lora import Route, add_adapter, parts_of, whole
from heliostat.linear.paca import settle
from heliostat.model import transformer
from heliostat.model.config import ModelConfig
from heliostat.model.seam import Causal
from heliostat.model.transformer import Tape, Transformer
from heliostat.train.dropbp import Dropping, branches_of
from heliostat.train.droprates import Branch
from heliostat.train.loop import Settings, make_optimizer, rate_share, take_step
from heliostat.train.recipe import ALL_LINEARS

OWN = "own"
FULL, LORA, PACA = "full", "lora", "paca"
PEFT_LORA, PEFT_DORA, PEFT_PACA = "peft-lora", "peft-dora", "peft-paca"
FROZEN = "frozen"
"""Nothing but one norm is tuned, and the gradient goes back to it: less work than any adapter has."""
TUNERS = (FULL, LORA, PACA, FROZEN, PEFT_LORA, PEFT_DORA, PEFT_PACA)


@dataclass(frozen=True, slots=True)
class Work:
    """What a step does: ``batch`` rows of ``length`` tokens, loss on the last ``spoken`` of each."""

    config: ModelConfig
    batch: int
    length: int
    spoken: int
    bf16: bool
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Case:
    """One way of tuning; ``r`` None for full tuning."""

    tuner: str
    r: int | None = None
    dropbp: float = 0.0
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """As the tables say it."""
        rank = "" if self.r is None else f" r {self.r}"
        dropped = f", dropbp {self.dropbp:g}" if self.dropbp else ""
        return f"{self.tuner}{rank}{dropped}"


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds of the parts of one step; ``branches`` is a part of ``backward``."""

    forward: float
    backward: float
    branches: float
    rest: float
    """Clipping and the optimizer."""
    untaped: float
    """Forward when nothing is kept for a backward pass, as a dropped branch runs."""

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.rest

    def ratio(self, rate: float) -> float:
        """The measured-term model: a step's time at a drop rate, in steps of rate 0. Only branches shrink."""
        return (self.total - rate * self.branches) / self.total

    def whole_ratio(self, rate: float) -> float:
        """The same where all that a dropped branch leaves out is counted: its tape, and its part of the optimizer's work."""
        saved = self.branches + (self.forward - self.untaped) + self.rest
        return (self.total - rate * saved) / self.total


@dataclass(slots=True)
class Rows:
    """Some rows as a micro-batch of the loop."""

    run: Callable[[], Tensor]
    spoken: int
    tokens: int

    def loss(self) -> Tensor:
        """Summed over the spoken tokens."""
        return self.run()


class _Saved:
    """A tensor that the graph holds; gone with it. Without its own place in the graph, or it would hold that."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


@dataclass(slots=True)
class Tuned:
    """A model with a tuner on it; several cases of different rates step it in turn."""

    work: Work
    tuner: str
    r: int | None
    model: Transformer = field(init=False)
    parameters: dict[str, nn.Parameter] = field(init=False)
    route: Route | None = field(init=False, default=None)
    optimizer: torch.optim.Optimizer = field(init=False)
    branches: tuple[Branch, ...] = field(init=False)
    settings: Settings = field(init=False)
    steps: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.model = _random(self.work, whole=self.tuner == FULL)
        self.parameters = _put_on(self.model, self.tuner, self.r)
        if self.tuner in (LORA, PACA):
            self.route = whole(OWN)
        self.settings = Settings(steps=1_000_000, learning_rate=1e-4, bf16=self.work.bf16)
        self.optimizer = make_optimizer(self.parameters, self.settings)
        self.branches = ()
        if self.tuner != FROZEN:
            self.branches = branches_of(
                self.work.config,
                self.parameters,
                whole=self.tuner == FULL,
                writes_for_itself=True,
                context=self.work.length / 2,
            )

    def step(self, case: Case) -> float:
        """Seconds of one whole step."""
        self.steps += 1
        run = partial(self.loss, self.tape(case), self._ids(self.steps), checkpointing=case.checkpointing)
        work = self.work
        micro = Rows(run, work.batch * work.spoken, work.batch * work.length)
        return timed(
            lambda: take_step([micro], self.parameters, self.optimizer, 0, self.settings), work.device
        )

    def tape(self, case: Case) -> Tape | None:
        """The branches of the step at hand."""
        if not case.dropbp:
            return None
        dropping = Dropping(self.branches, case.dropbp, seed=0, measured_at=None)
        return dropping.tape(self.steps, lambda tape: torch.zeros(()), self.parameters)

    def loss(self, tape: Tape | None, ids: Tensor, *, checkpointing: bool = False) -> Tensor:
        """Summed loss of the spoken tokens; logits of these only."""
        work, model = self.work, self.model
        model.checkpointing = checkpointing
        positions = torch.arange(ids.shape[1] - 1, device=ids.device).expand(len(ids), -1)
        hidden = model(ids[:, :-1], positions, Causal(), self.route, tape)
        logits = model.logits(hidden[:, -work.spoken :].flatten(0, 1)).float()
        return nn.functional.cross_entropy(logits, ids[:, -work.spoken :].flatten(), reduction="sum")

    def kept(self, case: Case, *, batch: int | None = None, length: int | None = None) -> int:
        """Bytes of distinct storages that one forward pass keeps for the backward pass, parameters left out.

        Where blocks are computed again their inputs count, which are what is kept of them.
        """
        ids = self._ids(0, batch, length)
        own = {p.untyped_storage().data_ptr() for p in (*self.model.parameters(), *self.model.buffers())}
        saved: weakref.WeakSet[_Saved] = weakref.WeakSet()
        inputs: list[_Saved] = []

        def pack(tensor: Tensor) -> _Saved:
            one = _Saved(tensor)
            saved.add(one)
            return one

        with self._autocast(), _inputs_of_checkpoints(lambda x: inputs.append(_Saved(x))):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
                loss = self.loss(self.tape(case), ids, checkpointing=case.checkpointing)
            # While the loss lives, what the graph still holds: what was saved for a dropped branch's norm is gone.
            storages = {
                s.data_ptr(): s.nbytes() for s in (o.tensor.untyped_storage() for o in (*saved, *inputs))
            }
        del loss
        return sum(size for place, size in storages.items() if place not in own)

    def fixed(self) -> int:
        """Bytes of weights, gradients and AdamW's moments."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (*self.model.parameters(), *self.model.buffers())
        }
        return sum(storages.values()) + 12 * sum(p.numel() for p in self.parameters.values())

    def longest(self, case: Case, budget: int) -> int:
        """Tokens of one row whose step fits in so many bytes: from two measured lengths, as what is kept grows linearly."""
        short, long = 256, 512
        first = self.kept(case, batch=1, length=short)
        slope = (self.kept(case, batch=1, length=long) - first) / (long - short)
        return max(0, short + int((budget - self.fixed() - first) / slope))

    def phases(self) -> Phases:
        """One step at rate 0 in parts. A branch's backward goes from its output's gradient to its input's."""
        self.steps += 1
        ids, device = self._ids(self.steps), self.work.device
        begins: dict[nn.Module, float] = {}
        ends: dict[nn.Module, float] = {}

        def watch(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(lambda grad: begins.__setitem__(module, now(device)))
            if args[0].requires_grad:
                args[0].register_hook(lambda grad: ends.__setitem__(module, now(device)))

        hooks = [
            part.register_forward_hook(watch)
            for block in self.model.blocks
            for part in (block.self_attn, block.mlp)
        ]
        start = now(device)
        with self._autocast():
            loss = self.loss(None, ids) / (self.work.batch * self.work.spoken)
        middle = now(device)
        loss.backward()
        end = now(device)
        for hook in hooks:
            hook.remove()
        rest = timed(self._descend, device)
        with torch.no_grad(), self._autocast():
            untaped = timed(lambda: self.loss(None, ids), device)
        # What has nothing trained before it passes no gradient on; it is the last to run.
        branches = sum(ends.get(part, end) - begin for part, begin in begins.items())
        return Phases(middle - start, end - middle, branches, rest, untaped)

    def _descend(self) -> None:
        nn.utils.clip_grad_norm_(list(self.parameters.values()), self.settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rate_share(0, self.settings)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _autocast(self) -> torch.autocast:
        kind = torch.device(self.work.device).type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=self.work.bf16)

    def _ids(self, step: int, batch: int | None = None, length: int | None = None) -> Tensor:
        """Token ids [B, T + 1] by chance, the same for every tuner at the same step."""
        chance = torch.Generator().manual_seed(step)
        shape = (batch or self.work.batch, (length or self.work.length) + 1)
        return torch.randint(self.work.config.vocabulary, shape, generator=chance).to(self.work.device)


def now(device: str) -> float:
    """Seconds; on a GPU when its work so far is done. One thread on a CPU counts its own time, not its neighbours'."""
    if device != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds that it takes."""
    begin = now(device)
    run()
    return now(device) - begin


@contextmanager
def _inputs_of_checkpoints(keep: Callable[[Tensor], None]) -> Iterator[None]:
    """Shows what is kept of parts that are computed again: hooks on saved tensors do not see it."""
    inner = transformer.checkpoint

    def seen(run: Any, x: Tensor, **options: Any) -> Any:
        keep(x)
        return inner(run, x, **options)

    with patch.object(transformer, "checkpoint", seen):
        yield


def _random(work: Work, *, whole: bool) -> Transformer:
    """A model of chance: float32 where all of it is trained, else as frozen weights are held."""
    torch.manual_seed(0)
    with torch.device(work.device):
        model = Transformer(work.config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    kind = torch.bfloat16 if work.bf16 and not whole else torch.float32
    return model.to(work.device, kind)


def _put_on(model: Transformer, tuner: str, r: int | None) -> dict[str, nn.Parameter]:
    """The tuner on the model; the parameters that it trains."""
    if tuner == FULL:
        return dict(model.named_parameters())
    model.requires_grad_(False)
    if tuner == FROZEN:
        return dict(model.blocks[0].post_attention_layernorm.requires_grad_().named_parameters())
    assert r is not None
    if tuner.startswith("peft-"):
        return _peft(model, tuner, r)
    if tuner == LORA:
        add_adapter(model, OWN, r=r, alpha=2 * r, targets=ALL_LINEARS)
    else:
        add_columns(model, OWN, r=r, targets=ALL_LINEARS)
        settle(model, OWN)
    parts: Mapping[str, nn.Module] = parts_of(model, OWN)
    return {f"{path}.{n}": p for path, part in parts.items() for n, p in part.named_parameters()}


def _peft(model: Transformer, tuner: str, r: int) -> dict[str, nn.Parameter]:
    """PEFT's layers in our transformer; what is trained is float32, as its own models have it."""
    import peft

    options: dict[str, Any] = {"r": r, "target_modules": list(ALL_LINEARS)}
    if tuner == PEFT_PACA:
        if not has_peft_paca():
            raise Refused(f"{tuner}: PEFT {peft.__version__} has no PaCA")
        config = getattr(peft, "PacaConfig")(**options)  # noqa: B009 - in newer versions only
    else:
        config = peft.LoraConfig(lora_alpha=2 * r, use_dora=tuner == PEFT_DORA, **options)
    peft.inject_adapter_in_model(config, model)
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for parameter in found.values():
        parameter.data = parameter.data.float()
    return found


def has_peft_paca() -> bool:
    """Whether the PEFT that is installed has PaCA of its own."""
    import peft

    return hasattr(peft, "PacaConfig")
