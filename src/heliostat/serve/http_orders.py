"""Orders as completions of the OpenAI dialect that vLLM speaks, and what of an order they cannot carry. No torch.

Stop strings and text are not asked for: who listens makes both of the token ids, so that a member says the same,
letter for letter, whichever engine it is served by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from heliostat.serve.protocol import Order, Sampled

ELSEWHERE = "serve the family without --engine vllm: the embedded engine can"


class Logprobs(msgspec.Struct):
    """Of a completion's tokens, each written ``token_id:7``."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


class Choice(msgspec.Struct):
    """What one event adds to an answer, or a whole answer."""

    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class Details(msgspec.Struct):
    """Of a prompt."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """What was counted."""

    prompt_tokens: int = 0
    prompt_tokens_details: Details | None = None

    @property
    def cached(self) -> int:
        """Prompt tokens that did not have to run."""
        return (self.prompt_tokens_details.cached_tokens or 0) if self.prompt_tokens_details else 0


class Completion(msgspec.Struct):
    """An event of a stream, or an answer in one piece."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None
    kv_transfer_params: dict[str, Any] | None = None


decoded = msgspec.json.Decoder(Completion).decode
"""Raises msgspec.DecodeError for what is no such thing."""


def sampled_of(choice: Choice) -> list[Sampled]:
    """Its tokens. Raises ValueError where log-probabilities do not belong to them."""
    tokens, known = choice.token_ids or [], choice.logprobs
    if known is None:
        return [Sampled(token) for token in tokens]
    if len(known.token_logprobs) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens with {len(known.token_logprobs)} log-probabilities")
    tops = known.top_logprobs or [None] * len(tokens)
    return [
        Sampled(token, chance, _top(top))
        for token, chance, top in zip(tokens, known.token_logprobs, tops, strict=True)
    ]


def _top(found: Mapping[str, float] | None) -> tuple[tuple[int, float], ...]:
    pairs = [(int(name.rpartition(":")[2]), chance) for name, chance in (found or {}).items()]
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


def beyond(order: Order, *, said: int) -> str:
    """What of an order an engine cannot keep to that is handed ``said`` answer tokens as a prompt; '' : nothing."""
    if not said or order.sampling.max_tokens <= said:
        return ""
    if order.sampling.presence_penalty or order.sampling.frequency_penalty:
        return f"presence_penalty and frequency_penalty forget tokens that another engine said; {ELSEWHERE}"
    if order.schema is not None:
        return f"a JSON schema cannot be gone on with after tokens that another engine said; {ELSEWHERE}"
    return ""


def completion(
    order: Order, *, model: str, prompt: Sequence[int], most: int, eos: Sequence[int], stream: bool
) -> dict[str, Any]:
    """The body that asks ``model`` for ``most`` tokens after ``prompt``, by the order's wishes.

    ``eos``: the family's end tokens, said by id: an engine's own idea of them is not asked.
    """
    wish, said = order.sampling, len(order.answer)
    ends = [] if wish.ignore_eos else list(eos)
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": most,
        "min_tokens": min(most, max(0, wish.min_tokens - said)),
        "temperature": wish.temperature,
        "repetition_penalty": 1.0,
        "presence_penalty": wish.presence_penalty,
        "frequency_penalty": wish.frequency_penalty,
        "top_p": wish.top_p,
        "top_k": wish.top_k,
        "min_p": wish.min_p,
        "ignore_eos": order.schema is None,
        "stop_token_ids": ends,
        "return_token_ids": True,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    if wish.temperature > 0:
        body["seed"] = _seed(wish.seed, wish.choice, said)
    if wish.logprobs is not None:
        body |= {"logprobs": wish.logprobs, "return_tokens_as_token_ids": True}
    if wish.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in wish.logit_bias.items()}
    if order.schema is not None:
        body["structured_outputs"] = {"json": msgspec.json.decode(order.schema)}
    return body


def _seed(seed: int, choice: int, said: int) -> int:
    """An engine that draws from one stream of noise a request begins another one where an answer is gone on with."""
    digest = hashlib.blake2b(f"{seed}|{choice}|{said}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
