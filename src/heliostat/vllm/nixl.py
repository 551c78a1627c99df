"""vLLM's NixlConnector between any machines, with the checks that it lacks: who wrote, how many tokens, and no reading anew.

It would load as many tokens as the request has, and run a prompt with its own weights where it loads none, or loses
what it had.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlConnector
from vllm.logger import init_logger

from heliostat.errors import Refused
from heliostat.vllm.asked import model_of, settings_of, wrong

logger = init_logger(__name__)
MISSING = "heliostat_missing"
"""Attribute of what the scheduler tells the workers: pages of requests that must fail."""


class CheckedNixl(NixlConnector):
    """See the module. ``kv_connector_extra_config``: ``{"heliostat": launch.settings(...), ...}``."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        facts = self._kv_transfer_config.get_from_extra_config("heliostat", None)
        settings = settings_of(facts) if facts else None
        if settings is None:
            raise Refused("CheckedNixl needs what heliostat says of the worker: start it with heliostat")
        self.settings = settings
        self.refused: dict[str, list[int]] = {}
        """Requests that must fail, and their pages once they have some."""
        self.loaded: set[str] = set()
        self.missing: set[int] = set()

    # In the scheduler.

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens are loaded: what the request says, or, to fail it, some."""
        params = request.kv_transfer_params
        count = request.num_prompt_tokens
        found = wrong(self.settings, model_of(request, self.settings), params, count)
        reason = "" if found is None else found.reason
        if request.request_id in self.loaded:
            reason = "its keys and values were given up for others, and can be loaded once only"
        elif not reason and not (params or {}).get("do_remote_prefill"):
            return 0, False
        tokens = count - 1 if reason else int(params["tokens"])
        more = tokens - num_computed_tokens
        if not reason:
            return (more, True) if more > 0 else (0, False)
        logger.error("request %s fails: %s", request.request_id, reason)
        if more <= 0:
            return None, False  # vLLM cannot fail it here: it waits until whoever asked gives up
        self.refused[request.request_id] = []
        return more, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has pages now."""
        if request.request_id not in self.refused:
            if num_external_tokens > 0:
                self.loaded.add(request.request_id)
            return super().update_state_after_alloc(request, blocks, num_external_tokens)
        self.refused[request.request_id] = list(blocks.get_block_ids()[0])
        return None

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """What vLLM's own says, and what must fail in this step."""
        metadata = super().build_connector_meta(scheduler_output)
        scheduled = scheduler_output.num_scheduled_tokens
        gone = [pages for name, pages in self.refused.items() if name in scheduled]
        setattr(metadata, MISSING, {page for pages in gone for page in pages})
        return metadata

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """What is said of the keys and values of a prompt that was read."""
        self.refused.pop(request.request_id, None)
        self.loaded.discard(request.request_id)
        asked = dict(request.kv_transfer_params or {})
        delayed, said = super().request_finished_all_groups(request, block_ids)
        if not asked.get("do_remote_decode"):
            return delayed, said
        if not said:
            return delayed, {"failed": "the request ended before its prompt was read"}
        return delayed, {
            **said,
            "writer": asked["writer"],
            "tokens": asked["tokens"],
            "fit": self.settings.fit,
        }

    # In a worker.

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Before a pass."""
        self.missing |= getattr(self._connector_metadata, MISSING, set())
        super().start_load_kv(forward_context, **kwargs)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that were not loaded: vLLM fails their requests."""
        missing, self.missing = self.missing, set()
        found: set[int] = super().get_block_ids_with_load_errors() | missing
        return found
