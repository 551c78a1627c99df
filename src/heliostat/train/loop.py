"""The one training loop: optimizer steps over an objective, with schedule, clipping, resume, log and progress.

Knows neither rows nor families: an objective says what the loss of a step is, the caller which parameters move.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from heliostat.errors import Refused
from heliostat.files import atomic_write_text
from heliostat.train import checkpoint
from heliostat.train.checkpoint import Progress
from heliostat.train.ranks import ALONE, Ranks, whole

LOG = "log.jsonl"


class Micro(Protocol):
    """A part of a step small enough for memory."""

    @property
    def spoken(self) -> int:
        """Tokens that carry loss."""

    @property
    def tokens(self) -> int:
        """Tokens that run through modules, all modules together."""

    def loss(self) -> Tensor:
        """Sum (not mean) of the losses of its spoken tokens, with a tape."""


class Objective(Protocol):
    """What is learned: the micro-batches of every step, the same for the same step."""

    def micros(self, step: int) -> Sequence[Micro]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to descend."""

    steps: int
    learning_rate: float
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = 0
    decay_share: float = 0.2
    """Share of the steps in which a warmup_stable_decay schedule falls to zero."""
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    bf16: bool = False
    logging_steps: int = 10
    eval_steps: int = 0
    save_steps: int = 0
    save_total_limit: int = 2


class Watch(Protocol):
    """Who looks on: a progress bar, a test, nobody."""

    def step(self, record: Mapping[str, Any]) -> None: ...


class Interrupted(Exception):
    """Ctrl-C: the state is saved, the same command goes on from it."""


def rate_share(step: int, settings: Settings) -> float:
    """Share of the peak learning rate at a step (0-based), in [0, 1]."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    rest = max(1, settings.steps - settings.warmup_steps)
    done = min(1.0, (step - settings.warmup_steps) / rest)
    match settings.lr_scheduler_type:
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        case "warmup_stable_decay":
            return min(1.0, (1.0 - done) / settings.decay_share)
    return 1.0


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """AdamW; norms and biases (one dimension) are not decayed."""
    matrices = [p for p in parameters.values() if p.dim() > 1]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kept = [g for g in groups if g["params"]]
    return torch.optim.AdamW(
        kept, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon, fused=True
    )


@dataclass(slots=True)
class Run:
    """One run in a folder: what moves, by what, and how far it is."""

    objective: Objective
    parameters: Mapping[str, nn.Parameter]
    settings: Settings
    folder: Path
    identity: str
    watch: Watch
    evaluate: Callable[[], Mapping[str, float]] | None = None
    ranks: Ranks = ALONE
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that move without a gradient and are saved with the parameters."""
    after: Callable[[], None] = lambda: None
    """Is called once after every optimizer step, whatever the number of its micro-batches."""

    @property
    def kept(self) -> dict[str, Tensor]:
        """All that a checkpoint holds but the optimizer."""
        return {**self.parameters, **self.buffers}

    def fit(self, *, resume: bool = True) -> Progress:
        """Run to the last step, from the newest checkpoint where there is one. Ctrl-C saves, then raises Interrupted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        optimizer = make_optimizer(self.parameters, self.settings)
        progress = Progress()
        if resume:
            progress = checkpoint.resume(self.folder, self.kept, optimizer, identity=self.identity)
        elif self.ranks.first:  # or the next one to go on would find them
            for old in checkpoint.checkpoints(self.folder):
                checkpoint.discard(old)
        self.ranks.wait()
        self._begin_log(progress.history)
        with interruptible() as stopped:
            while progress.step < self.settings.steps and not self.ranks.agree(stopped()):
                progress = self._advance(optimizer, progress)
        self._save(optimizer, progress)
        if progress.step < self.settings.steps:
            raise Interrupted(
                f"stopped after step {progress.step} of {self.settings.steps}, saved in {self.folder}"
            )
        return progress

    def _advance(self, optimizer: torch.optim.Optimizer, progress: Progress) -> Progress:
        micros = self.objective.micros(progress.step)
        record = take_step(micros, self.parameters, optimizer, progress.step, self.settings, ranks=self.ranks)
        self.after()
        step = progress.step + 1
        history = progress.history
        last = step == self.settings.steps
        judged = self.evaluate is not None and (last or due(step, self.settings.eval_steps))
        if self.evaluate is not None and judged:
            record |= {f"eval_{k}": v for k, v in self.evaluate().items()}
        self.watch.step(record)
        if last or judged or due(step, self.settings.logging_steps):
            history = (*history, record)
            self._log(record)
        progress = Progress(step, history)
        if due(step, self.settings.save_steps):
            self._save(optimizer, progress)
        return progress

    def _log(self, record: Mapping[str, Any]) -> None:
        if self.ranks.first:
            with (self.folder / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")

    def _begin_log(self, history: Sequence[Mapping[str, Any]]) -> None:
        """The log as of the checkpoint: what a killed run wrote after it is written again."""
        if not self.ranks.first:
            return
        atomic_write_text(self.folder / LOG, "".join(json.dumps(record) + "\n" for record in history))

    def _save(self, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        checkpoint.save(
            self.folder,
            self.kept,
            optimizer,
            progress,
            identity=self.identity,
            keep=self.settings.save_total_limit,
            writes=self.ranks.first,
        )
        self.ranks.wait()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop after the step at hand; a second Ctrl-C is an ordinary one."""
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens at this one; 0 is never."""
    return every > 0 and step % every == 0


def take_step(
    micros: Sequence[Micro],
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    settings: Settings,
    *,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """One optimizer step over its micro-batches; the loss is the mean over all spoken tokens of the step, on all ranks.

    Returns the step's record: step (1-based), loss (nats a token), learning_rate, grad_norm, tokens, seconds.
    """
    begin, spoken = time.perf_counter(), ranks.total(sum(micro.spoken for micro in micros))
    device = next(iter(parameters.values())).device.type
    total = 0.0
    for micro in micros:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=settings.bf16):
            loss = micro.loss() / spoken
        if loss.requires_grad:  # a row may leave all that is said in these examples to a frozen module
            (loss * ranks.weight if ranks.weight > 1 else loss).backward()
        total += float(loss.detach())
    ranks.add_up(parameters.values())
    total = ranks.total(total)
    if not math.isfinite(total):
        raise Refused(
            f"the loss became {total} at step {step + 1}: lower --learning-rate, or look at the data there"
        )
    norm = whole(nn.utils.clip_grad_norm_(list(parameters.values()), settings.max_grad_norm or math.inf))
    if not math.isfinite(norm):
        raise Refused(f"the gradient became {float(norm)} at step {step + 1}: lower --learning-rate")
    rate = settings.learning_rate * rate_share(step, settings)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = int(ranks.total(sum(micro.tokens for micro in micros)))
    seconds = time.perf_counter() - begin
    return {
        "step": step + 1,
        "loss": total,
        "learning_rate": rate,
        "grad_norm": float(norm),
        "tokens": tokens,
        "seconds": round(seconds, 6),
    }
