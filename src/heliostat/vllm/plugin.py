"""What vLLM calls in each of its processes (entry point ``vllm.general_plugins``): models, and which pages are equal.

Does nothing in a process that heliostat did not start.
"""

from __future__ import annotations

import importlib
import inspect
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from heliostat.errors import Refused
from heliostat.vllm.asked import Settings, settings_of
from heliostat.vllm.launch import KEY, NIXL, TWO_STREAMS
from heliostat.vllm.sealed import refuse_other
from heliostat.vllm.versions import refuse_missing, refuse_unsupported

STANDS_ON = {
    "vllm.distributed.kv_transfer.kv_connector.v1.base": (
        "KVConnectorBase_V1.get_num_new_matched_tokens",
        "KVConnectorBase_V1.update_state_after_alloc",
        "KVConnectorBase_V1.build_connector_meta",
        "KVConnectorBase_V1.on_new_request",
        "KVConnectorBase_V1.request_finished",
        "KVConnectorBase_V1.register_kv_caches",
        "KVConnectorBase_V1.get_block_ids_with_load_errors",
    ),
    "vllm.config.kv_transfer": ("KVTransferConfig.kv_load_failure_policy",),
    "vllm.v1.core.kv_cache_utils": ("generate_block_hash_extra_keys",),
}
NIXL_STANDS_ON = {
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl": (
        "NixlConnector.get_num_new_matched_tokens",
        "NixlConnector.update_state_after_alloc",
        "NixlConnector.build_connector_meta",
        "NixlConnector.request_finished_all_groups",
        "NixlConnector.start_load_kv",
        "NixlConnector.get_block_ids_with_load_errors",
    ),
}
TWO_STREAMS_STAND_ON = {
    "vllm.v1.core.kv_cache_utils": ("_gen_lora_extra_hash_keys",),
    "vllm.lora.layers.base_linear": ("BaseLinearLayerWithLoRA",),
    "vllm.lora.punica_wrapper.punica_base": ("PunicaWrapperBase.add_lora_linear",),
    "vllm.v1.attention.backend": ("CommonAttentionMetadata.query_start_loc",),
    "vllm.forward_context": ("get_forward_context",),
    "vllm.model_executor.models.llama": ("LlamaForCausalLM", "LlamaAttention"),
}


def stands_on(settings: Settings) -> dict[str, tuple[str, ...]]:
    """What a process of this kind needs: names in modules of vLLM."""
    two = TWO_STREAMS_STAND_ON if settings.two_streams else {}
    nixl = NIXL_STANDS_ON if settings.transfer == NIXL else {}
    found = dict(STANDS_ON)
    for more in (two, nixl):
        found |= {module: (*found.get(module, ()), *names) for module, names in more.items()}
    return found


VERIFIED = "HELIOSTAT_VERIFIED"
"""Environment variable: the incarnation whose files were compared; a server's other processes inherit it."""


def register() -> None:
    """Raises Refused, which ends the process, where it should have a key and has none, its vLLM is not one that the plug-ins
    know, or what it would load is not what was exported."""
    settings = settings_of()
    if settings is None:
        return
    if settings.keyed and not os.environ.get(KEY):
        raise Refused(
            f"vLLM server {settings.worker!r}: {KEY} is not set, or empty, and without it anybody who reaches this server "
            "could ask it: give the process the key that the router has"
        )
    found = version("vllm")
    refuse_unsupported(found)
    refuse_missing(found, missing(stands_on(settings)))
    _verify_once(settings)
    if settings.two_streams:
        register_two_streams()


def _verify_once(settings: Settings) -> None:
    if os.environ.get(VERIFIED) == settings.incarnation:
        return
    for folder, digest in settings.folders.items():
        refuse_other(Path(folder), digest)
    os.environ[VERIFIED] = settings.incarnation


def missing(asked: dict[str, tuple[str, ...]]) -> list[str]:
    """Of these names in modules of vLLM, those that are not there."""
    return [
        f"{module}.{name}" for module, names in asked.items() for name in names if not _there(module, name)
    ]


def _there(module: str, name: str) -> bool:
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return False
    for part in name.split("."):
        fields = getattr(found, "__dataclass_fields__", {})
        if not hasattr(found, part) and part not in fields:
            return False
        found = inspect.getattr_static(found, part, fields.get(part))
    return True


def register_two_streams() -> None:
    """The models of two streams; and a page is found whatever adapter spoke over it, since none has written in it."""
    from vllm import ModelRegistry
    from vllm.v1.core import kv_cache_utils

    for name in sorted(set(TWO_STREAMS.values())):
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"heliostat.vllm.two_streams:{name}")
    kv_cache_utils._gen_lora_extra_hash_keys = lambda request: []
