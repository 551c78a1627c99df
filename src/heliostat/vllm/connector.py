"""A connector of vLLM for one machine: exactly a prompt's tokens, from who wrote them to who goes on, or a failed request.

vLLM makes one in its scheduler, which knows requests, and one in each of its workers, which hold the cache. What cannot be
loaded fails the request (kv_load_failure_policy "fail"); nothing is ever computed in its place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger
from vllm.v1.request import RequestStatus

from heliostat.errors import Refused
from heliostat.vllm import kept
from heliostat.vllm.asked import Settings, model_of, settings_of, wrong
from heliostat.vllm.wire import tokens_digest

logger = init_logger(__name__)


@dataclass
class Job:
    """Pages of one request that a worker copies."""

    request: str
    handle: str
    writer: str
    tokens: int
    ids: str
    pages: list[int]
    """Numbers in the cache, of the positions from ``start``."""
    start: int = 0
    """First page, counted from the prompt's beginning, that is copied."""
    failed: str = ""
    """Why nothing can be copied: the pages count as not loaded."""


@dataclass
class Jobs(KVConnectorMetadata):
    """What workers do in one step."""

    loads: list[Job] = field(default_factory=list)
    saves: list[Job] = field(default_factory=list)


@dataclass
class Reading:
    """A prompt that is being read here for somebody else."""

    writer: str
    tokens: int
    ids: str
    handle: str
    pages: list[int] = field(default_factory=list)
    saved: bool = False
    wrong: str = ""


class FileConnector(KVConnectorBase_V1):
    """See the module. ``kv_connector_extra_config``: ``{"heliostat": launch.settings(...)}``."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise Refused("keys and values of models with several kinds of cache cannot be handed over")
        facts = self._kv_transfer_config.get_from_extra_config("heliostat", None)
        settings = settings_of(facts) if facts else None
        if settings is None:
            raise Refused("FileConnector needs what heliostat says of the worker: start it with heliostat")
        self.settings: Settings = settings
        self.page_size = int(vllm_config.cache_config.block_size)
        if self.page_size != settings.page_size:
            raise Refused(
                f"vLLM chose pages of {self.page_size} positions, asked for were {settings.page_size}"
            )
        self.folder = kept.private_folder(settings.folder)
        self.parts = int(vllm_config.parallel_config.tensor_parallel_size)
        self.loading: dict[str, Job] = {}
        self.reading: dict[str, Reading] = {}
        self.worker = InWorker(self, kv_cache_config) if role == KVConnectorRole.WORKER else None

    def label(self, job: Job | Reading, *, layout: str = "", part: int = 0) -> kept.Label:
        """What is kept, or should be, for a request."""
        share = f"{part}/{self.parts}"
        return kept.Label(job.writer, job.tokens, job.ids, self.settings.fit, layout, share)

    # In the scheduler.

    def on_new_request(self, request: Any) -> None:
        """A request that came in; prompts to be kept are remembered."""
        params = request.kv_transfer_params or {}
        if not params.get("do_remote_decode"):
            return
        found = wrong(self.settings, model_of(request, self.settings), params, request.num_prompt_tokens)
        ids = request.prompt_token_ids or []
        self.reading[request.request_id] = Reading(
            str(params.get("writer", "")),
            request.num_prompt_tokens,
            tokens_digest(ids),
            f"{self.settings.incarnation}-{uuid4().hex}",
            wrong="" if found is None else found.reason,
        )

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens are loaded: what the request says, or, to fail it, some."""
        self.loading.pop(request.request_id, None)
        job = self._job(request)
        if job is None:
            return 0, False
        missing = job.tokens - num_computed_tokens
        if missing <= 0 and job.failed:
            logger.error("request %s cannot run here, and waits: %s", request.request_id, job.failed)
            return None, False  # vLLM cannot fail it here: it waits until whoever asked gives up
        if missing <= 0:
            return 0, False
        self.loading[request.request_id] = job
        return missing, False

    def _job(self, request: Any) -> Job | None:
        """What a request loads, looked at; None where it loads nothing, and rightly."""
        params, name, count = request.kv_transfer_params, request.request_id, request.num_prompt_tokens
        found = wrong(self.settings, model_of(request, self.settings), params, count)
        if found is not None:
            return None if name in self.reading else Job(name, "", "", count - 1, "", [], failed=found.reason)
        if not params or not params.get("do_remote_prefill"):
            return None
        writer, tokens, handle = params["writer"], params["tokens"], str(params.get("handle", ""))
        job = Job(name, handle, writer, tokens, tokens_digest(request.prompt_token_ids[:tokens]), [])
        try:
            kept.check(self.folder, handle, self.label(job))
        except Refused as refused:
            job.failed = str(refused)
        return job

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The request has pages now."""
        job = self.loading.get(request.request_id)
        if job is None or num_external_tokens <= 0:
            return
        job.start = (job.tokens - num_external_tokens) // self.page_size
        job.pages = list(blocks.get_block_ids()[0])[job.start : -(-job.tokens // self.page_size)]

    def build_connector_meta(self, scheduler_output: Any) -> Jobs:
        """What the workers copy in this step: what its requests load, and prompts that it reads to their end."""
        scheduled = scheduler_output.num_scheduled_tokens
        jobs = Jobs(loads=[job for name, job in self.loading.items() if name in scheduled])
        self.loading = {name: job for name, job in self.loading.items() if name not in scheduled}
        for new in scheduler_output.scheduled_new_reqs:
            self._read(jobs, new.req_id, new.block_ids[0], new.num_computed_tokens, scheduled, anew=True)
        cached = scheduler_output.scheduled_cached_reqs
        for number, name in enumerate(cached.req_ids):
            pages = cached.new_block_ids[number]
            anew = name in cached.resumed_req_ids
            computed = cached.num_computed_tokens[number]
            self._read(jobs, name, pages[0] if pages else [], computed, scheduled, anew=anew)
        return jobs

    def _read(
        self, jobs: Jobs, name: str, pages: list[int], computed: int, scheduled: dict[str, int], *, anew: bool
    ) -> None:
        reading = self.reading.get(name)
        if reading is None:
            return
        reading.pages = [*([] if anew else reading.pages), *pages]
        if reading.saved or reading.wrong or computed + scheduled[name] < reading.tokens:
            return
        reading.saved = True
        count = -(-reading.tokens // self.page_size)
        jobs.saves.append(
            Job(name, reading.handle, reading.writer, reading.tokens, reading.ids, reading.pages[:count])
        )

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """What is said of the keys and values of a prompt that was read; what was loaded is needed no more."""
        self.loading.pop(request.request_id, None)
        reading = self.reading.pop(request.request_id, None)
        if reading is None:
            job = self._job(request)
            if job is not None and not job.failed:  # what is somebody else's stays
                kept.release(self.folder, job.handle)
            return False, None
        if request.status == RequestStatus.FINISHED_ABORTED:
            kept.release(self.folder, reading.handle)
        return False, self._said(reading)

    def _said(self, reading: Reading) -> dict[str, Any]:
        if reading.wrong:
            return {"failed": reading.wrong}
        if not reading.saved:
            return {"failed": "the request ended before its prompt was read"}
        reason = kept.refusal(self.folder, reading.handle)
        try:
            for part in range(self.parts):
                kept.check(self.folder, reading.handle, self.label(reading, part=part))
        except Refused as refused:
            kept.release(self.folder, reading.handle)
            return {"failed": reason or str(refused)}
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "handle": reading.handle,
            "writer": reading.writer,
            "tokens": reading.tokens,
            "fit": self.settings.fit,
        }

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """The caches of all layers."""
        assert self.worker is not None
        self.worker.register(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Before a pass: bring in what its requests load."""
        assert self.worker is not None
        jobs = self._get_connector_metadata()
        assert isinstance(jobs, Jobs)
        for job in jobs.loads:
            self.worker.load(job)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded beside a pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Pages are kept whole, after the pass."""

    def wait_for_save(self) -> None:
        """After a pass: keep the prompts that it read to their end."""
        assert self.worker is not None
        jobs = self._get_connector_metadata()
        assert isinstance(jobs, Jobs)
        for job in jobs.saves:
            self.worker.save(job)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Pages that were not loaded: vLLM fails their requests."""
        assert self.worker is not None
        missing, self.worker.missing = self.worker.missing, set()
        return missing

    def shutdown(self) -> None:
        """Nothing stays behind."""
        if self.worker is not None and self.worker.shelf is not None:
            self.worker.shelf.close()


class InWorker:
    """What a connector does where the cache is."""

    def __init__(self, connector: FileConnector, kv_cache_config: Any) -> None:
        self.connector, self.folder = connector, connector.folder
        self.pages = int(kv_cache_config.num_blocks)
        self.caches: dict[str, kept.Cache] = {}
        self.layout = ""
        self.missing: set[int] = set()
        self.part = 0
        self.shelf: kept.Shelf | None = None

    def register(self, caches: dict[str, Tensor]) -> None:
        """Lay out what is copied of each layer, and who this share is."""
        from vllm.distributed import get_tensor_model_parallel_rank

        settings = self.connector.settings
        self.part = int(get_tensor_model_parallel_rank())
        self.caches = {name: kept.Cache.of(name, tensor, self.pages) for name, tensor in caches.items()}
        shapes = {name: cache.facts for name, cache in self.caches.items()}
        self.layout = json.dumps([torch.backends.cpu.get_cpu_capability(), shapes])
        if settings.role == "prefill":
            own, keep = settings.incarnation, settings.keep_mib << 20
            shelf = kept.Shelf(self.folder, own, keep, settings.lease)  # it counts all shares
            self.shelf = shelf.open() if self.part == 0 else shelf

    def load(self, job: Job) -> None:
        """Bring in the pages of a request, or count them as missing."""
        connector = self.connector
        try:
            if job.failed:
                raise Refused(job.failed)
            label = connector.label(job, layout=self.layout, part=self.part)
            found = kept.read(self.folder, job.handle, label)
            for name, cache in self.caches.items():
                cache.put(job.pages, found[name][job.start * cache.split :])
        except (Refused, KeyError) as error:
            logger.error("request %s fails: %s", job.request, error)
            self.missing.update(job.pages)

    def save(self, job: Job) -> None:
        """Keep the pages of a prompt; where that fails, say why."""
        assert self.shelf is not None
        label = self.connector.label(job, layout=self.layout, part=self.part)
        try:
            pages = {name: cache.take(job.pages) for name, cache in self.caches.items()}
            self.shelf.write(job.handle, label, pages)
        except Refused as refused:
            logger.error("request %s: %s", job.request, refused)
            self.shelf.refuse(job.handle, str(refused))
