"""The processes that train one model together: each takes its share of every batch, and all take the same step.

Two ways: ``ddp`` keeps everything in every process and adds up gradients; ``fsdp`` (torch's FSDP2) also parts weights,
gradients and moments, whole modules and frozen ones alike, and puts a block together while it runs. One process is no
special case: ``ALONE`` does nothing at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heliostat.build import device_named
from heliostat.errors import Refused
from heliostat.model.transformer import Transformer
from heliostat.train.recipe import Pace

T = TypeVar("T")
P = TypeVar("P", bound=Pace)
MEETING = "HELIOSTAT_MEETING"
"""Environment: a file by which processes of `--processes` find each other; torchrun has its own way."""
PATIENCE = timedelta(minutes=30)
"""How long one process waits for another; evaluations and checkpoints of the first one lie in between."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process among those that train together. ``number`` counts from 0; the first one writes and tells."""

    number: int = 0
    count: int = 1
    sharded: bool = False
    """Whether weights, gradients and moments are parted among them."""

    @property
    def alone(self) -> bool:
        return self.count == 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.number == 0

    @property
    def weight(self) -> int:
        """What a process's loss is multiplied by: parted gradients are averaged over the processes, not summed."""
        return self.count if self.sharded else 1

    def share(self, examples: Sequence[T]) -> list[T]:
        """This process's part of a batch, like in length to the others'; may be empty."""
        return list(examples[self.number :: self.count])

    def total(self, number: float) -> float:
        """The sum over all processes."""
        if self.alone:
            return number
        summed = torch.tensor(number, dtype=torch.float64, device=_device())
        dist.all_reduce(summed)
        return float(summed)

    def as_first(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's values, in place; every process has tensors of the same shapes."""
        if not self.alone:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, wish: bool) -> bool:
        """Whether any process wishes it."""
        return wish if self.alone else self.total(float(wish)) > 0

    def wait(self) -> None:
        """Until all processes are here."""
        if not self.alone:
            self.total(0.0)

    def spread(
        self, models: Iterable[Transformer], parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, nn.Parameter]:
        """Part the models among the processes; returns the trained parameters, which are others from now on."""
        if not self.sharded or self.alone:
            return dict(parameters)
        from torch.distributed.device_mesh import DeviceMesh  # seconds to load, so only where it is wanted
        from torch.distributed.fsdp import fully_shard

        models = list(models)
        owners = {
            id(p): (module, leaf)
            for model in models
            for module in model.modules()
            for leaf, p in module.named_parameters(recurse=False)
        }
        kept = {name: owners[id(p)] for name, p in parameters.items()}
        mesh = DeviceMesh(_device().type, list(range(self.count)))
        for model in models:
            for part in (*model.blocks, model):
                fully_shard(part, mesh=mesh)
        return {name: getattr(module, leaf) for name, (module, leaf) in kept.items()}

    def gather(self, models: Iterable[Transformer]) -> None:
        """Make the models' parameters whole again in every process, to be saved; they run no more."""
        if not self.sharded or self.alone:
            return
        from torch.distributed.fsdp import FSDPModule

        done: dict[int, nn.Parameter] = {}
        for model in models:
            for parted_one in [m for m in model.modules() if isinstance(m, FSDPModule)]:
                parted_one.reshard()
            for module in model.modules():
                for leaf, parameter in list(module.named_parameters(recurse=False)):
                    if id(parameter) not in done:
                        full = nn.Parameter(whole(parameter.detach()), requires_grad=parameter.requires_grad)
                        done[id(parameter)] = full
                    module.register_parameter(leaf, done[id(parameter)])

    def add_up(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over the processes; parted ones are summed already. A parameter has one everywhere or nowhere."""
        if self.alone or self.sharded:
            return
        parameters = list(parameters)
        has = torch.tensor(
            [p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device
        )
        dist.all_reduce(has, op=dist.ReduceOp.MAX)
        for parameter, somewhere in zip(parameters, has.tolist(), strict=True):
            if not somewhere:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


ALONE = Ranks()


def parted(tensor: Tensor) -> bool:
    """Whether this process has a part of the tensor only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be parted, as one; every process must ask for it."""
    made: Tensor = getattr(tensor, "full_tensor", lambda: tensor)()
    return made


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, where ``like`` is parted; else the tensor itself."""
    if not parted(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def wanted() -> int:
    """How many processes this one was started to train with, by torchrun or by `--processes`."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or not int(text):
        raise Refused(f"WORLD_SIZE is {text!r}; it is the number of processes that train together")
    return int(text)


def joined(recipe: P) -> tuple[P, Ranks]:
    """Meet the other processes that this one was started with, where there are any; the meeting ends with `left`.

    Returns the recipe for this process, which on a GPU names one of its own.
    """
    count = wanted()
    if count == 1:
        return recipe, ALONE
    number, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    file = os.environ.get(MEETING)
    on_cpu = device_named(recipe.device) == "cpu"
    if not on_cpu:
        torch.cuda.set_device(local)
        recipe = recipe.model_copy(update={"device": f"cuda:{local}"})
    dist.init_process_group(
        "gloo" if on_cpu else "nccl",
        init_method=f"file://{file}" if file else "env://",
        rank=number,
        world_size=count,
        timeout=PATIENCE,
    )
    return recipe, Ranks(number, count, recipe.data_parallel == "fsdp")


def left() -> None:
    """Leave the meeting, if there was one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
