"""A judge: a linear probe that says of a drafted token whether it will do, though it is not the speaker's own choice.

It reads the speaker's last hidden state (after the last norm) at the position where the drafted token is the input, which
a verifying pass computes anyway. Source: arXiv 2510.02329. Knows no drafting and no engine.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from heliostat.errors import Refused
from heliostat.family import NAME
from heliostat.files import saving

JUDGES = "judges"
"""Folder of a family."""
KIND, VERSION = "heliostat.judge", "1"
WEIGHT, BIAS = "weight", "bias"
WORDS = ("speaker", "draft", "speaker_module", "draft_module")
DIGEST_SHOWN = 12


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """One speaker's judge of one draft's tokens."""

    weight: Tensor
    """[E] float32; what the states were standardised by is folded in."""
    bias: float
    speaker: str
    """Digest of the module whose hidden states it reads."""
    draft: str
    """Digest of the module whose tokens it has seen."""
    theta: float
    """A token with a higher score will do; ``inf``: none will, which is exact speculative decoding."""
    thetas: Mapping[str, float]
    """Thresholds by how they were chosen: ``recall``, ``f1``."""
    speaker_module: str
    draft_module: str
    report: Mapping[str, Any] = field(default_factory=dict)
    """How it was made and how good it is, for people to read."""

    def scores(self, hidden: Tensor) -> Tensor:
        """Probability [rows] float32, in [0, 1], that each token will do, of states ``hidden`` [rows, E] of any float dtype.

        A row's score hangs on that row alone: products are summed row by row, so that a batch changes no decision.
        """
        weight = self.weight.to(hidden.device)
        return torch.sigmoid((hidden.float() * weight).sum(-1) + self.bias)

    def check(self, speaker_digest: str, draft_digest: str, *, folder: str | Path = "FAM") -> None:
        """Refuse to judge for another speaker, or another draft, than it was trained on. ``folder``: for the advice."""
        found = (("speaker", self.speaker, speaker_digest), ("draft", self.draft, draft_digest))
        for what, known, asked in found:
            if known == asked:
                continue
            raise Refused(
                f"this judge knows the {what} {getattr(self, f'{what}_module')!r} of digest {known[:DIGEST_SHOWN]}, "
                f"not one of digest {asked[:DIGEST_SHOWN] or 'none'}: train another with {self._advice(folder)}"
            )

    def _advice(self, folder: str | Path) -> str:
        words = ["heliostat", "judge", str(folder), "--speaker", self.speaker_module]
        return shlex.join([*words, "--draft", self.draft_module, "--data", "PROMPTS.jsonl"])


def judge_name(speaker: str, draft: str) -> str:
    """Name of the judge of a draft's tokens for a speaker (both module names), where nobody gave another."""
    return f"{speaker}-{draft}"


def judge_file(family: Path, name: str) -> Path:
    """Where the judge of that name lies. Refused for what is no name."""
    if not NAME.fullmatch(name):
        raise Refused(
            f"{name!r} is no judge's name: letters, digits, '.', '_', '-', at most 64, not starting with a sign"
        )
    return Path(family) / JUDGES / f"{name}.safetensors"


def write_judge(family: Path, name: str, judge: Judge) -> Path:
    """The file of a judge, written whole or not at all; one of the same name is replaced."""
    path = judge_file(family, name)
    metadata = {"kind": KIND, "version": VERSION, **{word: getattr(judge, word) for word in WORDS}}
    metadata |= {"theta": json.dumps(judge.theta), "thetas": json.dumps(dict(judge.thetas))}
    metadata["report"] = json.dumps(dict(judge.report))
    tensors = {WEIGHT: judge.weight.float().contiguous(), BIAS: torch.tensor([judge.bias])}
    path.parent.mkdir(parents=True, exist_ok=True)
    with saving(path) as partial:
        save_file(tensors, str(partial), metadata=metadata)
    return path


def read_judge(family: Path, name: str) -> Judge:
    """The judge of that name. Refused where it is missing (with those there are), damaged, or no judge."""
    path = judge_file(family, name)
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.safetensors"))
        advice = (
            f"heliostat judge {shlex.quote(str(family))} --speaker base --draft DRAFT --data PROMPTS.jsonl"
        )
        raise Refused(
            f"{family} has no judge {name!r}; there is: {', '.join(there) or 'none yet'} (make one: {advice})"
        )
    try:
        with safe_open(str(path), framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise Refused(f"{path} is damaged or not safetensors: {error}") from error
    if (metadata.get("kind"), metadata.get("version")) != (KIND, VERSION):
        raise Refused(f"{path} is no judge that this heliostat reads ({KIND} {VERSION})")
    weight, bias = _probe(tensors, path)
    theta, thetas, report = (_told(metadata, key, path) for key in ("theta", "thetas", "report"))
    if not isinstance(thetas, dict) or not isinstance(report, dict):
        raise Refused(f"{path} is damaged: thetas and report must be objects")
    for what, value in {"theta": theta, **thetas}.items():
        check_theta(value, f"{path}: {what}")
    if lacking := [word for word in WORDS if not metadata.get(word)]:
        raise Refused(f"{path} is damaged: it lacks {', '.join(lacking)}")
    words = {word: metadata[word] for word in WORDS}
    return Judge(weight, bias, theta=float(theta), thetas=thetas, report=report, **words)


def check_theta(value: object, what: str = "theta") -> float:
    """A threshold: in [0, 1], or ``inf`` for none will do. Refused otherwise."""
    number = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    if 0 <= number <= 1 or number == math.inf:
        return number
    raise Refused(f"{what} is {value!r}; it must be a number from 0 to 1, or inf: no token is accepted by it")


def _probe(tensors: Mapping[str, Tensor], path: Path) -> tuple[Tensor, float]:
    if set(tensors) != {WEIGHT, BIAS}:
        raise Refused(f"{path} is no judge: it holds {', '.join(sorted(tensors)) or 'no tensors'}")
    weight, bias = tensors[WEIGHT], tensors[BIAS]
    whole = weight.dim() == 1 and len(weight) > 0 and bias.shape == (1,)
    if not whole or weight.dtype != torch.float32 or bias.dtype != torch.float32:
        raise Refused(
            f"{path} is damaged: weight is {tuple(weight.shape)} {weight.dtype}, bias {tuple(bias.shape)} "
            f"{bias.dtype}; they must be (E,) and (1,) of float32"
        )
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise Refused(f"{path} holds numbers that are not finite (nan or infinite)")
    return weight, float(bias)


def _told(metadata: Mapping[str, str], key: str, path: Path) -> Any:
    try:
        return json.loads(metadata[key])
    except (KeyError, json.JSONDecodeError, RecursionError) as error:
        raise Refused(f"{path} is damaged: its {key} cannot be read") from error
