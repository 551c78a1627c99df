"""What vLLM calls in each of its processes (entry point ``vllm.general_plugins``): models, and which pages are equal.

Does nothing in a process that heliostat did not start.
"""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import version
from typing import Any

from heliostat.vllm.asked import settings_of
from heliostat.vllm.launch import TWO_STREAMS
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
TWO_STREAMS_STAND_ON = {
    "vllm.v1.core.kv_cache_utils": ("_gen_lora_extra_hash_keys",),
    "vllm.lora.layers.base_linear": ("BaseLinearLayerWithLoRA",),
    "vllm.forward_context": ("get_forward_context",),
    "vllm.model_executor.models.llama": ("LlamaForCausalLM", "LlamaAttention"),
}


def register() -> None:
    """Raises Refused, which ends the process, where this vLLM is not one that the plug-ins know."""
    settings = settings_of()
    if settings is None:
        return
    found = version("vllm")
    refuse_unsupported(found)
    asked = {**STANDS_ON, **(TWO_STREAMS_STAND_ON if settings.two_streams else {})}
    refuse_missing(found, missing(asked))
    if settings.two_streams:
        register_two_streams()


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
