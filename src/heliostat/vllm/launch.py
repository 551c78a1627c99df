"""How a vLLM process is started for modules of a family: its command line and environment, exactly. No torch, no vLLM."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heliostat.errors import Refused
from heliostat.vllm.wire import Role

FILES = "files"
"""Our connector: one machine, files in memory."""
NIXL = "nixl"
"""vLLM's NixlConnector, with our checks in front: any machines."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Highest ranks of adapters that vLLM lays out memory for."""
CPU_PAGE = 32
"""vLLM's attention on processors takes pages of multiples of this."""
SIDE = 1000
"""With ``nixl`` a worker also listens at its port and this, where others ask how to reach its memory."""
SETTINGS = "HELIOSTAT_WORKER"
"""Environment variable by which a process knows what it is: ``Settings`` as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosted:
    """A module as a process hosts it."""

    name: str
    """The family's."""
    digest: str
    folder: str
    """In the layout that vLLM loads (``layout``): a checkpoint with its tokenizer, or an adapter in PEFT's format."""
    rank: int = 0
    """Of an adapter."""

    @property
    def model(self) -> str:
        """Its name in ``model`` of a request: ``math.own#0123456789ab``."""
        return f"{self.name}#{self.digest[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One vLLM worker."""

    name: str
    weights: Hosted
    adapters: tuple[Hosted, ...] = ()
    zero: str = ""
    """Folder of an adapter that changes nothing: requests of the weights themselves run with it where adapters are hosted,
    since vLLM on processors gives a batch's last adapter to a request that has none."""
    role: Role = "both"
    """``both``: nothing travels. ``prefill`` keeps prompts for others, ``decode`` goes on from what was kept."""
    two_streams: bool = False
    """The weights write, adapters only speak: every request's keys and values are the weights'."""
    architecture: str = "LlamaForCausalLM"
    """As the checkpoint's config.json names it."""
    dtype: str = "auto"
    page_size: int = CPU_PAGE
    """Positions."""
    max_length: int = 2048
    """Most tokens of a request."""
    max_running: int = 64
    cache_mib: int = 1024
    """For pages, of all its devices together."""
    device: str = "cpu"
    cores: str = ""
    """On processors, which ones (``0-3``); empty: as vLLM likes. Give each process others."""
    tensor_parallel: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    transfer: str = FILES
    """``files``, ``nixl``, or the name of another connector of vLLM."""
    transfer_options: Mapping[str, Any] = field(default_factory=dict)
    """Goes into kv_connector_extra_config as it is."""
    folder: str = "/dev/shm/heliostat-vllm"
    """Where ``files`` puts what is handed over; made, and kept to this user. The same for all workers of a cluster."""
    keep_mib: int = 1024
    """Most memory for what this worker keeps for others."""
    lease: float = 120.0
    """Seconds for which it is kept, if nobody fetches it."""
    fit: str = ""
    incarnation: str = ""
    """Letters and digits; empty: the process draws one."""
    extra: tuple[str, ...] = ()
    """Further words for ``vllm serve``."""

    def __post_init__(self) -> None:
        if self.incarnation and not self.incarnation.isalnum():
            raise Refused(
                f"worker {self.name!r}: incarnation {self.incarnation!r} is not of letters and digits"
            )
        if self.adapters and not self.zero:
            raise Refused(f"worker {self.name!r} hosts adapters, and no adapter that changes nothing")
        if self.two_streams and self.architecture not in TWO_STREAMS:
            raise Refused(
                f"worker {self.name!r}: two streams of {self.architecture} are not known to the plug-in for vLLM (known: "
                f"{', '.join(TWO_STREAMS)}); serve this family with the embedded engine: heliostat serve, without "
                "--engine vllm"
            )
        if self.device == "cpu" and self.page_size % CPU_PAGE:
            raise Refused(f"page size {self.page_size}: vLLM on processors takes multiples of {CPU_PAGE}")
        ranks = [module.rank for module in self.adapters]
        if ranks and max(ranks) > RANKS[-1]:
            raise Refused(f"an adapter has rank {max(ranks)}; vLLM runs up to {RANKS[-1]}")

    @property
    def hands(self) -> bool:
        """Whether keys and values travel from or to it."""
        return self.role != "both"

    @property
    def caches(self) -> bool:
        """Whether vLLM may find pages again by their tokens: not where another module may have written them."""
        return self.role != "decode" or self.two_streams

    @property
    def modules(self) -> dict[str, str]:
        """Name in ``model`` -> digest of who speaks."""
        named = {
            _served(self): self.weights.digest
        }  # with adapters, its own name is that of one that changes nothing
        return named | {module.model: module.digest for module in (self.weights, *self.adapters)}

    @property
    def writers(self) -> dict[str, str]:
        """Name in ``model`` -> digest of who writes."""
        if self.two_streams:
            return dict.fromkeys(self.modules, self.weights.digest)
        return self.modules


TWO_STREAMS = {
    "LlamaForCausalLM": "HeliostatTwoStreamLlama",
    "Qwen2ForCausalLM": "HeliostatTwoStreamQwen2",
    "Qwen3ForCausalLM": "HeliostatTwoStreamQwen3",
}
"""Architecture of a checkpoint -> name of the plug-in's class for it."""


@dataclass(frozen=True, slots=True)
class Command:
    """A process: its words, and what its environment has beside the caller's."""

    words: tuple[str, ...]
    environment: Mapping[str, str]


def command(launch: Launch, *, python: str = sys.executable) -> Command:
    """The process of one worker. ``python``: that of an environment with vLLM and heliostat in it."""
    words = [python, "-m", "vllm.entrypoints.cli.main", "serve", launch.weights.folder]
    words += ["--host", launch.host, "--port", str(launch.port)]
    words += ["--dtype", launch.dtype, "--block-size", str(launch.page_size)]
    words += ["--max-model-len", str(launch.max_length), "--max-num-seqs", str(launch.max_running)]
    words += ["--kv-cache-memory-bytes", str((launch.cache_mib << 20) // launch.tensor_parallel)]  # of each
    words += ["--served-model-name", _served(launch), "--generation-config", "vllm"]
    words += ["--middleware", "heliostat.vllm.front.Front"]
    words.append("--enable-prompt-tokens-details")  # or nobody hears how much was found again
    words += ["--enable-prefix-caching" if launch.caches else "--no-enable-prefix-caching"]
    if launch.tensor_parallel > 1:
        words += ["--tensor-parallel-size", str(launch.tensor_parallel)]
    if launch.hands:
        words += ["--kv-transfer-config", json.dumps(transfer_config(launch))]
    words += _adapters(launch)
    if launch.two_streams:
        overrides = {"architectures": [TWO_STREAMS[launch.architecture]]}
        words += ["--hf-overrides", json.dumps(overrides)]
    if launch.two_streams or launch.device == "cpu":
        words.append("--enforce-eager")  # graphs know one stream
    return Command((*words, *launch.extra), environment(launch))


def _served(launch: Launch) -> str:
    """With adapters, the weights' own name is that of the adapter that changes nothing."""
    return f"{launch.weights.model}:weights" if launch.adapters else launch.weights.model


def _adapters(launch: Launch) -> list[str]:
    if not launch.adapters:
        return []
    hosted = [(launch.weights.model, launch.zero), *((m.model, m.folder) for m in launch.adapters)]
    rank = next(r for r in RANKS if r >= max(module.rank for module in launch.adapters))
    count = str(len(hosted))
    words = ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", count, "--max-cpu-loras", count]
    return [*words, "--lora-modules", *(json.dumps({"name": n, "path": p}) for n, p in hosted)]


def transfer_config(launch: Launch) -> dict[str, Any]:
    """``--kv-transfer-config`` of a worker that hands over or takes in."""
    options: dict[str, Any] = {"heliostat": settings(launch), **launch.transfer_options}
    config: dict[str, Any] = {
        "kv_role": "kv_producer" if launch.role == "prefill" else "kv_consumer",
        "kv_load_failure_policy": "fail",
    }
    if launch.transfer == FILES:
        config |= {"kv_connector": "FileConnector", "kv_connector_module_path": "heliostat.vllm.connector"}
    elif launch.transfer == NIXL:
        config |= {"kv_connector": "CheckedNixl", "kv_connector_module_path": "heliostat.vllm.nixl"}
        options.setdefault("enforce_handshake_compat", False)  # its own check has the model's path in it
        if launch.device == "cpu":
            config["kv_buffer_device"] = "cpu"
    else:
        config["kv_connector"] = launch.transfer
    return {**config, "kv_connector_extra_config": options}


def settings(launch: Launch) -> dict[str, Any]:
    """What the plug-ins in the process know of it."""
    return {
        "worker": launch.name,
        "incarnation": launch.incarnation,
        "role": launch.role,
        "modules": launch.modules,
        "writers": launch.writers,
        "weights": _served(launch),
        "two_streams": launch.two_streams,
        "page_size": launch.page_size,
        "dtype": launch.dtype,
        "max_length": launch.max_length,
        "max_running": launch.max_running,
        "fit": launch.fit,
        "transfer": launch.transfer if launch.hands else "",
        "folder": launch.folder,
        "keep_mib": launch.keep_mib,
        "lease": launch.lease,
    }


def environment(launch: Launch) -> dict[str, str]:
    """Variables of the process. Secrets are not among them: whoever starts it sets VLLM_API_KEY."""
    found = {
        SETTINGS: json.dumps(settings(launch)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if launch.device == "cpu":
        found["VLLM_CPU_OMP_THREADS_BIND"] = launch.cores or "auto"
    if launch.transfer == NIXL and launch.hands:
        found["VLLM_NIXL_SIDE_CHANNEL_HOST"] = launch.host
        found["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(launch.port + SIDE)
        if launch.device == "cpu":
            found["UCX_TLS"] = "tcp,self,sm"
    return found
