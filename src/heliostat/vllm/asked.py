"""Whether a vLLM worker may run a request: who writes its prompt, and whether what it loads is what it should be. No torch.

Asked twice: where a request comes in, so that its client hears the reason, and in the engine, so that none gets past.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from heliostat.vllm.launch import FILES, NIXL, SETTINGS
from heliostat.vllm.wire import Facts

INCARNATION = "HELIOSTAT_INCARNATION"
Code = Literal["refused", "module_missing", "misfit", "pages_gone"]


class Settings(Facts, frozen=True, kw_only=True):
    """What a process is (``launch.settings``)."""

    weights: str
    """Name in ``model`` of a request that runs without an adapter."""
    two_streams: bool
    folder: str
    keep_mib: int
    lease: float


class Wrong(msgspec.Struct, frozen=True):
    """Why a request must not run here; ``code`` as the protocol of workers has it."""

    code: Code
    reason: str


def settings_of(facts: Mapping[str, Any] | None = None) -> Settings | None:
    """The settings out of a connector's options, or out of the environment; None where heliostat did not start this."""
    if facts is not None:
        return _born(msgspec.convert(json.loads(json.dumps(dict(facts))), type=Settings))
    text = os.environ.get(SETTINGS, "")
    return _born(msgspec.json.decode(text, type=Settings)) if text else None


def _born(settings: Settings) -> Settings:
    """With an incarnation: where nobody gave one, as under systemd, the first process draws it, and its children inherit."""
    if settings.incarnation:
        return settings
    drawn = os.environ.setdefault(INCARNATION, secrets.token_hex(8))
    return msgspec.structs.replace(settings, incarnation=drawn)


def model_of(request: Any, settings: Settings) -> str:
    """The name under which one of vLLM's own requests was asked for: that of its adapter, or of the weights."""
    adapter = request.lora_request
    return str(adapter.lora_name) if adapter else settings.weights


def wrong(settings: Settings, model: str, params: Mapping[str, Any] | None, count: int) -> Wrong | None:
    """What is wrong with a request of ``count`` token ids; None where nothing is. Looks into no file."""
    if model not in settings.writers:
        hosted = ", ".join(settings.writers)
        return Wrong("module_missing", f"{model!r} is not hosted here; hosted are: {hosted}")
    if not params:
        if settings.role == "both":
            return None
        return Wrong(
            "refused", "the request does not say who writes its prompt, and this worker does one half only"
        )
    writer, tokens = params.get("writer"), params.get("tokens")
    if not isinstance(writer, str) or not isinstance(tokens, int) or isinstance(tokens, bool):
        return Wrong(
            "refused", "kv_transfer_params must say who writes the prompt (writer) and how much (tokens)"
        )
    if params.get("do_remote_prefill"):
        return _loading(settings, model, params, tokens, count)
    own = settings.writers[model]
    if writer != own:
        return Wrong(
            "module_missing",
            f"the prompt is written by a module of digest {writer[:12]}; for {model!r} this worker writes with "
            f"{own[:12]}, and nothing is loaded: it would be another model's answer",
        )
    if params.get("do_remote_decode"):
        return _keeping(settings, tokens, count)
    return None if tokens == 0 else Wrong("refused", f"tokens is {tokens}, and nothing is loaded")


def _keeping(settings: Settings, tokens: int, count: int) -> Wrong | None:
    if settings.role != "prefill":
        return Wrong("refused", f"this worker keeps no prompts for others: its role is {settings.role}")
    if tokens != count:
        return Wrong("refused", f"{tokens} tokens should be kept, the prompt has {count}")
    return None


def _loading(
    settings: Settings, model: str, params: Mapping[str, Any], tokens: int, count: int
) -> Wrong | None:
    if settings.role != "decode":
        return Wrong("refused", f"this worker loads nothing: its role is {settings.role}")
    if not 0 < tokens < count:
        return Wrong(
            "refused", f"{tokens} tokens should be loaded, of {count}: the last one is always run here"
        )
    if settings.two_streams and params["writer"] != settings.writers[model]:
        return Wrong(
            "misfit",
            "this worker finds its pages again, and what should be loaded was written by another module",
        )
    if settings.transfer in (FILES, NIXL) and params.get("fit") != settings.fit:
        return Wrong(
            "misfit",
            "the worker that read the prompt differs in shape, tokenizer, rope, number format or page size",
        )
    return None
