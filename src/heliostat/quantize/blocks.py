"""One block of a transformer after the other: what comes into its Linears, their fits, and the block tuned as a whole.

AQLM's procedure (arXiv 2401.06118): a block is fitted to what it made, before it was quantized, of inputs that came through
the quantized blocks below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heliostat.errors import Refused
from heliostat.linear.choice import TOGETHER
from heliostat.linear.lora import Route
from heliostat.model.seam import Masked
from heliostat.model.transformer import Block, RMSNorm, Transformer
from heliostat.ops.codebook import Coded
from heliostat.ops.codebook_format import Format
from heliostat.ops.rope import cos_sin
from heliostat.quantize.calibration import batches
from heliostat.quantize.fit import Effort, Fit, damped, error, fit
from heliostat.train.text import PackedRows

ROWS = 8
"""Rows that run at once."""
LINEARS = (*TOGETHER[0], "o_proj", *TOGETHER[1], "down_proj")
"""What of a block is quantized: all its Linears. Embedding, head and norms stay as they are."""
INPUTS = {name: group[0] for group in TOGETHER for name in group}
"""Linears that read one input, by the first of them."""


class Fitted(nn.Module):
    """A Linear whose weight is what codebooks say, in training: codebooks and scales move, codes stay."""

    def __init__(self, found: Fit, bias: Tensor | None) -> None:
        super().__init__()
        self.format, self.codes, self.bias = found.format, found.codes, bias
        self.codebooks = nn.Parameter(found.codebooks.clone())
        self.factors = nn.Parameter(torch.ones_like(found.scales))
        self.scales = found.scales

    @property
    def found(self) -> Fit:
        """The fit as it is now, on the tape."""
        return Fit(self.format, self.codes, self.codebooks, self.scales * self.factors)

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        """[..., in] -> [..., out]."""
        return nn.functional.linear(x, self.found.dense(), self.bias)


@dataclass(frozen=True, slots=True)
class Layer:
    """A block in codebooks: its Linears and norms by their names in it, and how far it is from what it was."""

    coded: Mapping[str, Coded]
    norms: Mapping[str, Tensor]
    errors: Mapping[str, float]
    """Of each Linear ||W X - W^ X||^2 / ||W X||^2; of the ``block`` before and ``tuned`` after it was tuned."""


@dataclass(slots=True)
class Stream:
    """What stands between two blocks, for all calibration rows: x, a list of [B, T, E] float32."""

    model: Transformer
    rows: PackedRows
    x: list[Tensor]

    @classmethod
    @torch.no_grad()
    def begun(cls, model: Transformer, rows: PackedRows) -> Stream:
        """In front of the first block."""
        return cls(model, rows, [model.model.embed_tokens(ids) for ids, _, _ in batches(rows, ROWS)])

    def run(self, block: Block, place: int) -> Tensor:
        """What the block makes of the batch at ``place``."""
        ids = slice(place * ROWS, (place + 1) * ROWS)
        frequencies = self.model.frequencies
        angles = cos_sin(self.rows.positions[ids], frequencies, self.model.angle_scale, torch.float32)
        return block(self.x[place], angles, Masked.documents(self.rows.documents[ids]), None)

    @torch.no_grad()
    def through(self, block: Block) -> list[Tensor]:
        """What the block makes of all of it."""
        return [self.run(block, place) for place in range(len(self.x))]


def quantize_block(
    stream: Stream,
    number: int,
    format: Format,
    *,
    seed: int,
    steps: int,
    effort: Effort,
    kind: torch.dtype,
    tell: Callable[[str], None],
) -> Layer:
    """The block at ``number`` in codebooks; the model's own is as before. ``kind``: number format that norms are kept in.

    ``steps`` of Adam tune codebooks, scales and norms together; ``tell`` hears what is being done.
    """
    block = stream.model.blocks[number]
    tell("reads its inputs")
    squares, wanted = observed(stream, block, number)
    found, errors = {}, {}
    for place, (path, linear) in enumerate(linears_of(block).items()):
        name = path.rpartition(".")[2]
        tell(f"fits {name}")
        square = squares[INPUTS.get(name, name)]
        found[path] = fit(
            linear.weight.detach(),
            square,
            format,
            seed=seed * 1_000_003 + number * len(LINEARS) + place,
            effort=effort,
        )
        errors[path] = error(linear.weight.detach(), found[path].dense(), damped(square))
    tell("is tuned as a whole")
    coded, norms, around = _tuned(stream, block, found, wanted, steps=steps, seed=seed + number, kind=kind)
    return Layer(coded, norms, errors | around)


def linears_of(block: Block) -> dict[str, nn.Linear]:
    """The Linears of a block by their paths in it, in the order in which they run; not those of one number a head."""
    found = {path: part for path, part in block.named_modules() if isinstance(part, nn.Linear)}
    places = {path: LINEARS.index(name) for path in found if (name := path.rpartition(".")[2]) in LINEARS}
    return {path: found[path] for path in sorted(places, key=places.__getitem__)}


@torch.no_grad()
def observed(stream: Stream, block: Block, number: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """X^T X [K, K] (float64) of what comes into the block's Linears, by the first of those that read it; what it makes."""
    squares: dict[str, Tensor] = {}
    hooks = []
    for path, linear in linears_of(block).items():
        name = path.rpartition(".")[2]
        if INPUTS.get(name, name) != name:
            continue
        squares[name] = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)

        def add(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            flat = args[0].flatten(0, -2)
            squares[name] += flat.T @ flat

        hooks.append(linear.register_forward_pre_hook(add))
    try:
        made = stream.through(block)
    finally:
        for hook in hooks:
            hook.remove()
    for name, square in squares.items():
        if not square.isfinite().all():
            raise Refused(
                f"layer {number}: what comes into {name} is not finite (nan or infinite): on these data the module itself "
                "does not work, so nothing can be fitted to it"
            )
    return squares, made


def _tuned(
    stream: Stream,
    block: Block,
    found: Mapping[str, Fit],
    wanted: Sequence[Tensor],
    *,
    steps: int,
    seed: int,
    kind: torch.dtype,
) -> tuple[dict[str, Coded], dict[str, Tensor], dict[str, float]]:
    """Codebooks, scales and norms of the block tuned to what it made, as they are stored; kept where they got better."""
    plain = linears_of(block)
    norms = {path: part for path, part in block.named_modules() if isinstance(part, RMSNorm)}
    before = {path: norm.weight.detach().clone() for path, norm in norms.items()}
    fitted = {path: Fitted(found[path], linear.bias) for path, linear in plain.items()}
    try:
        _put(block, fitted)
        start = _kept(fitted, norms, kind)
        lowest = _distance(stream, block, start, wanted)
        _descend(stream, block, fitted, norms, wanted, steps=steps, seed=seed)
        end = _kept(fitted, norms, kind)
        after = _distance(stream, block, end, wanted)
    finally:
        _put(block, plain)
        for path, norm in norms.items():
            norm.weight = nn.Parameter(before[path], requires_grad=False)
    coded, kept = end if after < lowest else start
    return coded, kept, {"block": lowest, "tuned": min(lowest, after)}


def _kept(
    fitted: Mapping[str, Fitted], norms: Mapping[str, RMSNorm], kind: torch.dtype
) -> tuple[dict[str, Coded], dict[str, Tensor]]:
    """Everything as it will be stored."""
    coded = {
        path: Fit(f.format, f.codes, f.codebooks.detach(), f.found.scales.detach()).coded()
        for path, f in fitted.items()
    }
    return coded, {path: norm.weight.detach().to(kind) for path, norm in norms.items()}


def _put(block: nn.Module, parts: Mapping[str, nn.Module]) -> None:
    for path, part in parts.items():
        parent, _, leaf = path.rpartition(".")
        setattr(block.get_submodule(parent), leaf, part)


@torch.no_grad()
def put_layer(block: Block, coded: Mapping[str, Coded], norms: Mapping[str, Tensor]) -> None:
    """From now on the block's Linears and norms are what these stand for."""
    for path, part in coded.items():
        linear = block.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        linear.weight.copy_(part.dense(torch.float32))
    for path, weight in norms.items():
        norm = block.get_submodule(path)
        assert isinstance(norm, RMSNorm)
        norm.weight.copy_(weight)


@torch.no_grad()
def _distance(
    stream: Stream,
    block: Block,
    stored: tuple[Mapping[str, Coded], Mapping[str, Tensor]],
    wanted: Sequence[Tensor],
) -> float:
    """||block(X) - wanted||^2 / ||wanted - X||^2 with weights as they are stored; relative to what the block adds."""
    coded, norms = stored
    there = {path: block.get_submodule(path) for path in coded}
    weights = {path: block.get_submodule(path).weight for path in norms}
    dense = {path: _plain(part, there[path]) for path, part in coded.items()}
    try:
        _put(block, dense)
        for path, weight in norms.items():
            block.get_submodule(path).weight = nn.Parameter(weight.float(), requires_grad=False)
        gap = whole = 0.0
        for place, target in enumerate(wanted):
            gap += float((stream.run(block, place) - target).pow(2).sum())
            whole += float((target - stream.x[place]).pow(2).sum())
    finally:
        _put(block, there)
        for path, parameter in weights.items():
            block.get_submodule(path).weight = parameter
    return gap / whole if whole > 0 else gap


def _plain(coded: Coded, like: nn.Module) -> nn.Module:
    """A Fitted with the weights of ``coded``, made once."""
    return _Dense(coded.dense(torch.float32), getattr(like, "bias", None))


class _Dense(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.kept = weight, bias

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        return nn.functional.linear(x, *self.kept)


def _descend(
    stream: Stream,
    block: Block,
    fitted: Mapping[str, Fitted],
    norms: Mapping[str, RMSNorm],
    wanted: Sequence[Tensor],
    *,
    steps: int,
    seed: int,
) -> None:
    """Adam on codebooks, scales and norms, a batch a step."""
    # No parameter of the block but these moves: all others are frozen, as the model is.
    moving = [p for part in fitted.values() for p in part.parameters() if p.requires_grad]
    for norm in norms.values():
        norm.weight.requires_grad_(True)
        moving.append(norm.weight)
    adam = torch.optim.Adam(moving, lr=RATE, betas=(0.9, 0.95))
    chance = torch.Generator().manual_seed(seed)
    order = [
        n
        for _ in range(math.ceil(steps / len(wanted)))
        for n in torch.randperm(len(wanted), generator=chance).tolist()
    ]
    for step, place in enumerate(order[:steps]):
        for group in adam.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        target = wanted[place]
        with torch.enable_grad():
            loss = (stream.run(block, place) - target).pow(2).sum() / (target - stream.x[place]).pow(
                2
            ).sum().clamp_min(1e-30)
        adam.zero_grad()
        loss.backward()
        adam.step()


RATE = 1.5e-2
"""Of Adam on a whole block: codebooks have entries of about 1, scales move by their own size, norms are about 1."""
