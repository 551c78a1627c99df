"""From logits to the next token: every sampling field, with noise that depends on the request alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heliostat.engine.request import Sampling
from heliostat.ops.best import best


@dataclass(frozen=True, slots=True)
class Draw:
    """One token to choose: the wishes of its request, and the answer so far."""

    sampling: Sampling
    answer: Sequence[int]
    eos: Sequence[int]
    allowed: bytes | None = None
    """One bit a token id, the lowest first: the tokens to choose from; None: all."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The chosen token; with log-probabilities (nats, before temperature and cuts) where they were asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def uniform(seed: int, choice: int, place: int) -> float:
    """The one random number in [0, 1) for a place in an answer: a function of its arguments, never of the batch."""
    digest = hashlib.blake2b(f"{seed}|{choice}|{place}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def sample(logits: Tensor, draws: Sequence[Draw], highest: Sequence[int] | None = None) -> list[Sampled]:
    """Choose one token for each row of ``logits`` [N, V] (not changed).

    ``highest``: where the highest number of each row stands, if that is known: most rows ask for nothing else.
    """
    if not draws:
        return []
    tokens = list(best(logits)[0].tolist() if highest is None else highest)
    wishing = [row for row, draw in enumerate(draws) if _wishes(draw)]
    if wishing:
        chosen = _choose(logits[wishing].float(), [draws[row] for row in wishing])
        for row, token in zip(wishing, chosen, strict=True):
            tokens[row] = token
    return report(logits, tokens, draws)


def reads(draw: Draw) -> bool:
    """Whether more than the highest logit is asked for."""
    return draw.sampling.logprobs is not None or _wishes(draw)


def _wishes(draw: Draw) -> bool:
    """Whether the highest logit may not be the token to take."""
    wish = draw.sampling
    penalised = wish.presence_penalty or wish.frequency_penalty
    held = len(draw.answer) < wish.min_tokens
    return bool(wish.temperature > 0 or wish.logit_bias or penalised or held or draw.allowed is not None)


def _choose(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    steered = _mask(_steer(logits, draws), draws)
    tokens = steered.argmax(dim=-1)
    warm = [row for row, draw in enumerate(draws) if draw.sampling.temperature > 0]
    if warm:
        tokens[warm] = _draw(steered[warm], [draws[row] for row in warm])
    return tokens.tolist()


def _steer(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits after bias, penalties on the answer so far, and end tokens held back until ``min_tokens``."""
    out = logits
    for row, draw in enumerate(draws):
        wish, count = draw.sampling, len(draw.answer)
        held = list(draw.eos) if count < wish.min_tokens else []
        penalised = (wish.presence_penalty or wish.frequency_penalty) and count
        if not (held or penalised or wish.logit_bias):
            continue
        if out is logits:
            out = logits.clone()
        for token, bias in (wish.logit_bias or {}).items():
            out[row, token] += bias
        if penalised:
            seen = Counter(draw.answer)
            times = torch.tensor(list(seen.values()), dtype=out.dtype, device=out.device)
            out[row, list(seen)] -= wish.presence_penalty + wish.frequency_penalty * times
        out[row, held] = torch.finfo(out.dtype).min
    return out


def _mask(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Logits without the tokens that are not allowed, whatever was wished: one mask for all rows that have one."""
    rows = [row for row, draw in enumerate(draws) if draw.allowed is not None]
    if not rows:
        return logits
    packed = torch.frombuffer(
        bytearray(b"".join(draws[row].allowed or b"" for row in rows)), dtype=torch.uint8
    )
    packed = packed.view(len(rows), -1, 1).to(logits.device)
    bits = (packed >> torch.arange(8, dtype=torch.uint8, device=logits.device)) & 1  # [N, V / 8, 8]
    allowed = torch.zeros(len(rows), logits.shape[1], dtype=torch.bool, device=logits.device)
    known = min(logits.shape[1], bits.shape[1] * 8)  # a model may have more tokens than its tokenizer
    allowed[:, :known] = bits.flatten(1)[:, :known].bool()
    return logits.index_copy(
        0, torch.tensor(rows, device=logits.device), logits[rows].masked_fill(~allowed, -torch.inf)
    )


def _draw(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Sample each row [N, V]: temperature, then top-k, min-p and top-p, then the inverse of the distribution function."""
    wishes = [draw.sampling for draw in draws]
    column = {
        "temperature": [max(w.temperature, 1e-5) for w in wishes],
        "top_k": [w.top_k or logits.shape[1] for w in wishes],
        "top_p": [w.top_p for w in wishes],
        "min_p": [w.min_p for w in wishes],
        "noise": [uniform(w.seed, w.choice, len(d.answer)) for w, d in zip(wishes, draws, strict=True)],
    }
    t = {
        name: torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]
        for name, values in column.items()
    }
    chances, order = (
        (logits.double() / t["temperature"]).softmax(-1).sort(dim=-1, descending=True, stable=True)
    )
    keep = torch.arange(chances.shape[1], device=logits.device) < t["top_k"]
    keep &= chances >= t["min_p"] * chances[:, :1]
    chances = chances * keep
    reach = chances.cumsum(-1)
    keep = reach - chances < t["top_p"] * reach[:, -1:]  # of what the cuts before it left
    keep[:, 0] = True
    reach = (chances * keep).cumsum(-1)
    place = torch.searchsorted(reach, t["noise"] * reach[:, -1:], right=True).clamp(max=chances.shape[1] - 1)
    return order.gather(1, place).squeeze(1)


def report(logits: Tensor, tokens: Sequence[int], draws: Sequence[Draw]) -> list[Sampled]:
    """The tokens that were chosen by rows of ``logits`` [N, V], with the log-probabilities that were asked for."""
    found = [Sampled(token) for token in tokens]
    asked = [row for row, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    if not asked:
        return found
    chances = logits[asked].float().log_softmax(-1)
    for place, row in enumerate(asked):
        count = draws[row].sampling.logprobs or 0
        values, ids = chances[place].topk(min(count, chances.shape[1]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found[row] = Sampled(tokens[row], float(chances[place, tokens[row]]), top)
    return found
