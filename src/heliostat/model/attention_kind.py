"""Kinds of attention that a config.json may ask for, and their keys. Knows no torch.

Affine-scaled attention is that of arXiv 2602.23057: O = alpha softmax(QK) V + (average of alpha - alpha) / N sum(V).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from heliostat.errors import Refused
from heliostat.family import choose

KEY = "attention"
"""The object of config.json that holds what is read here."""
PREFIX = "heliostat_"
"""What model_type begins with where attention is of a kind of its own: no other program shall take it for softmax."""
NAMES: Mapping[str, frozenset[str]] = {
    "softmax": frozenset(),
    "sink": frozenset({"sink"}),
    "gated": frozenset({"gated"}),
    "affine": frozenset({"affine"}),
    "affine+gated": frozenset({"affine", "gated"}),
}
IN_WORDS: Mapping[str, str] = {
    "softmax": "softmax attention",
    "sink": "a learned logit for each head in the softmax",
    "gated": "a learned gate for each head behind attention",
    "affine": "a learned scale for each head, and a share of the sum of all values",
    "affine+gated": "a learned scale for each head, a share of the sum of all values, and a gate",
}
COUNTS = ("visible", "fixed")
ALPHAS = ("learned", "constant")


@dataclass(frozen=True, slots=True, repr=False)
class AttentionKind:
    """One kind, with its options."""

    name: str = "softmax"
    n: str = "visible"
    """What the sum of values is divided by: the positions that a query sees, or always ``length``: paper (inferred)."""
    length: int | None = None
    """N where it is fixed: the length that was trained."""
    alpha: str = "learned"
    """``constant``: a half for every token, the control that affine-scaled attention is measured against."""

    def __post_init__(self) -> None:
        choose(self.name, NAMES, what="attention")
        for option, value, allowed in (("n", self.n, COUNTS), ("alpha", self.alpha, ALPHAS)):
            if value not in allowed:
                raise Refused(f"attention: {option} is {value!r}; it is one of {', '.join(allowed)}")
        default = (self.n, self.alpha) == (COUNTS[0], ALPHAS[0]) and self.length is None
        if not self.affine and not default:
            raise Refused(f"attention {self.name!r} has no n, length and alpha: they belong to 'affine'")
        if self.n == "visible" and self.length is not None:
            raise Refused(f"attention: length is {self.length}, and n is 'visible', which has none")
        whole = isinstance(self.length, int) and not isinstance(self.length, bool)
        if self.n == "fixed" and (not whole or (self.length or 0) < 1):
            raise Refused(
                "attention: n is 'fixed' and needs a length, the positions that the model was trained with, a "
                f"positive whole number; it is {self.length!r}"
            )

    def __repr__(self) -> str:
        return json.dumps(self.to_json())

    @property
    def affine(self) -> bool:
        """Whether outputs are scaled and a share of all values is added; serving keeps their running sums."""
        return "affine" in NAMES[self.name]

    @property
    def gated(self) -> bool:
        """Whether each head's output is multiplied by a sigmoid of the input, one number a head."""
        return "gated" in NAMES[self.name]

    @property
    def sink(self) -> bool:
        """Whether each head has a learned logit in the softmax that no value belongs to."""
        return "sink" in NAMES[self.name]

    @property
    def learned(self) -> bool:
        """Whether alpha is a function of the input."""
        return self.affine and self.alpha == "learned"

    @property
    def plain(self) -> bool:
        """Whether it is softmax attention as everybody has it."""
        return not NAMES[self.name]

    @property
    def gates(self) -> int:
        """Numbers that a block computes of its input for each head, beside queries, keys and values."""
        return self.learned + self.gated

    def to_json(self) -> dict[str, Any]:
        """As config.json says it."""
        if not self.affine:
            return {"kind": self.name}
        fixed = {"length": self.length} if self.n == "fixed" else {}
        return {"kind": self.name, "n": self.n, **fixed, "alpha": self.alpha}


SOFTMAX = AttentionKind()


def read_kind(data: Mapping[str, Any], longest: int) -> AttentionKind:
    """The kind that a config.json asks for; ``longest``: tokens that the model runs. Refused, by name, what is unknown."""
    own = str(data.get("model_type")).startswith(PREFIX)
    said = data.get(KEY)
    if not own and said is None:
        return SOFTMAX
    if not own:
        raise Refused(
            f"config.json: {KEY!r} needs a model_type that begins with {PREFIX!r}, it is {data.get('model_type')!r}: "
            "other programs would run the model as softmax attention"
        )
    if not isinstance(said, Mapping):
        raise Refused(
            f"config.json: model_type {data['model_type']!r} needs {KEY!r}, an object; it is {said!r}"
        )
    if unknown := sorted(set(said) - {"kind", "n", "length", "alpha"}):
        raise Refused(f"config.json: {KEY} has options heliostat does not know: {', '.join(unknown)}")
    if "kind" not in said:
        raise Refused(f"config.json: {KEY} lacks 'kind', one of {', '.join(NAMES)}")
    values = {"name": str(said["kind"]), **{option: said[option] for option in said if option != "kind"}}
    kind = AttentionKind(**values)
    if kind.length is not None and kind.length < longest:
        raise Refused(
            f"config.json: attention's n is fixed at length {kind.length}, and max_position_embeddings is {longest}: "
            f"beyond {kind.length} positions it was never trained; lower max_position_embeddings"
        )
    return kind
