"""A frozen weight in codebooks as a way to be a Linear: adapters sit on it, products of one input join beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heliostat.errors import Refused
from heliostat.linear.lora import Linear, Route
from heliostat.ops.codebook import Coded, plain_codebook_linear
from heliostat.ops.codebook_product import CodedProduct


class CodebookLinear(Linear):
    """x [..., in] -> [..., out] by a weight that is codes, codebooks and scales; they are buffers, and never trained."""

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    def __init__(self, coded: Coded, bias: Tensor | None = None) -> None:
        """Around these tensors (no copy); ``bias`` [out]."""
        nn.Module.__init__(self)  # a Linear's own would make a dense weight
        self.format, self.in_features, self.out_features = coded.format, coded.inputs, coded.outputs
        for name in ("codes", "codebooks", "scales"):
            self.register_buffer(name, getattr(coded, name))
        own = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", own)
        self._product: CodedProduct | None = None

    @property
    def coded(self) -> Coded:
        """The tensors as they are now."""
        return Coded(self.format, self.in_features, self.codes, self.codebooks, self.scales)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # there is no dense weight to write to
        """A dense copy [out, in], made anew for everyone who asks; to write into it changes nothing here."""
        return self.coded.dense(torch.float32)

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        """[..., in] -> [..., out]."""
        if torch.is_grad_enabled():
            return plain_codebook_linear(x, self.coded, self.bias)
        return self.product(x, self.bias)

    @property
    def product(self) -> CodedProduct:
        """What runs where no gradient is wanted; made anew when the tensors are others."""
        made = self._product
        now = (self.codes, self.codebooks, self.scales)
        if made is None or any(a is not b for a, b in zip(_tensors(made.coded), now, strict=True)):
            made = self._product = CodedProduct(self.coded)
        return made

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.format}"


def _tensors(coded: Coded) -> tuple[Tensor, Tensor, Tensor]:
    return coded.codes, coded.codebooks, coded.scales


def put_codebook(model: nn.Module, path: str, coded: Coded) -> CodebookLinear:
    """Put a coded weight in the place of the Linear at ``path``; its bias stays. Refused where it does not fit there."""
    there = model.get_submodule(path)
    if not isinstance(there, nn.Linear):
        raise Refused(f"{path} is {type(there).__name__}, no Linear that could be coded")
    if (there.out_features, there.in_features) != (coded.outputs, coded.inputs):
        raise Refused(
            f"{path} is a Linear {there.in_features} -> {there.out_features}, the codes are of one "
            f"{coded.inputs} -> {coded.outputs}"
        )
    parent, _, leaf = path.rpartition(".")
    placed = CodebookLinear(coded, there.bias)
    setattr(model.get_submodule(parent), leaf, placed)
    return placed


def coded_linears(model: nn.Module) -> dict[str, CodebookLinear]:
    """The Linears in codebooks, by path, sorted."""
    found = {path: part for path, part in model.named_modules() if isinstance(part, CodebookLinear)}
    return {path: found[path] for path in sorted(found)}
