"""What a router and vLLM workers say to each other about keys and values: fields of requests and answers. No torch, no vLLM.

vLLM knows a cached page by its tokens, not by who wrote it. So every request says who writes its prompt (``writer``,
the digest of a module) and how many of its tokens' keys and values are to be loaded (``tokens``), and a worker fails a
request that it would have to read with another module than that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from heliostat.errors import Refused

PARAMS = "kv_transfer_params"
"""The field of a request and of an answer that holds one of these."""
DESCRIBED = "/heliostat/described"
"""GET: ``Described``, as JSON."""
RELEASE = "/heliostat/release"
"""POST ``{"handle": ...}``: what was written to be handed over is needed no more. Always answers 204."""
CODE = "X-Heliostat-Code"
"""Header of an answer that ends a request before it began: ``module_missing``, ``pages_gone``, ``misfit`` or ``refused``,
as the protocol of workers has them. The reason is the body's ``error.message``."""

Role = Literal["prefill", "decode", "both"]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a vLLM worker knows of itself and tells others."""

    worker: str
    incarnation: str
    """Drawn by chance at every start."""
    role: Role
    modules: Mapping[str, str]
    """Name in ``model`` of a request (``math.own#0123456789ab``) -> digest (hex) of the module that speaks."""
    writers: Mapping[str, str]
    """The same names -> digest of the module whose keys and values the worker writes for such a request."""
    page_size: int
    """Positions."""
    dtype: str
    max_length: int
    max_running: int
    fit: str
    """Digest of all that must be equal before keys and values may travel."""
    transfer: str
    """``files``, ``nixl``, another connector's name, or empty where nothing travels."""


class Described(Facts, frozen=True, kw_only=True):
    """What a vLLM worker is."""

    vllm: str
    """Its version; the others' too."""
    heliostat: str
    pages: int = 0
    """Of its cache; 0 where this version of vLLM does not say."""


def keep(writer: str, tokens: int) -> dict[str, Any]:
    """Params of a request that only reads a prompt: keep the keys and values of all its ``tokens`` for another worker."""
    return {"do_remote_decode": True, "do_remote_prefill": False, "writer": writer, "tokens": tokens}


def load(said: Mapping[str, Any] | None, writer: str, tokens: int) -> dict[str, Any]:
    """Params of the request that goes on from there, out of what the reading worker said. Refused where it kept nothing."""
    if not said or said.get("failed") or not said.get("do_remote_prefill"):
        reason = (said or {}).get("failed") or "it said nothing of keys and values"
        raise Refused(f"the worker that read the prompt kept nothing of it: {reason}")
    return {**said, "writer": writer, "tokens": tokens}


def alone(writer: str) -> dict[str, Any]:
    """Params of a request that one worker does alone: it must be ``writer`` that it writes with."""
    return {"writer": writer, "tokens": 0}


def salt(tenant: str) -> str | None:
    """``cache_salt`` of a tenant; None where there is none. vLLM takes at most 128 characters of few kinds."""
    return hashlib.sha256(tenant.encode()).hexdigest() if tenant else None


def tokens_digest(ids: Sequence[int]) -> str:
    """SHA-256 (hex) of token ids, by which what was kept is compared with what is asked."""
    return hashlib.sha256(b"".join(int(token).to_bytes(8, "little") for token in ids)).hexdigest()
