"""What serving takes, before anything is loaded: weights, pages and workspace, against the memory there is."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from heliostat.build import config_of, module_folder
from heliostat.engine.paged import PagePool
from heliostat.errors import Refused
from heliostat.family import Family
from heliostat.linear.adapter import adapter_bytes
from heliostat.model.config import ModelConfig
from heliostat.model.quantized import copied_bytes, loaded_bytes, read_quantization
from heliostat.model.transformer import Transformer
from heliostat.model.weights import read_shapes, weight_files

MIB = 2**20
_SAMPLING = 44
"""Bytes for each logit: float32 as it comes, and what the sampler makes of it in float64, ordered, summed, cut."""

REMEDY = (
    "Lower cache_mib, max_running or max_length, take fewer members, --dtype bfloat16, or allow more memory_mib "
    "if the machine has it"
)


@dataclass(frozen=True, slots=True)
class Shape:
    """All of a model that decides how large its pages are."""

    config: ModelConfig
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Ledger:
    """Bytes by what they are for, in the order in which they are taken."""

    lines: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Bytes of all lines."""
        return sum(size for _, size in self.lines)

    def table(self, limit: int) -> str:
        """A line for each, then the sum, then the limit, in MiB."""
        rows = [*self.lines, ("together", self.total), ("there is", limit)]
        wide = max(len(what) for what, _ in rows)
        return "\n".join(f"  {what:<{wide}}  {size / MIB:>10.1f} MiB" for what, size in rows)

    def refuse_over(self, limit: int, *, remedy: str = REMEDY) -> None:
        """Raise Refused, with all numbers, where the sum is more than ``limit`` bytes."""
        if self.total > limit:
            raise Refused(f"this does not fit into memory:\n{self.table(limit)}\n{remedy}")


def ledger_of(
    folder: Path,
    family: Family,
    modules: Iterable[str],
    *,
    dtype: torch.dtype,
    pages: int,
    page_size: int,
    max_running: int,
    max_tokens_per_step: int,
) -> Ledger:
    """What an engine with these modules takes. Only configs and the heads of safetensors files are read.

    Weights and pages are exact, weights that several modules run on counted once; the workspace is an estimate.
    """
    modules = list(modules)
    room = room_of(
        Shape(config_of(folder, family, modules[0]), dtype),
        pages=pages,
        page_size=page_size,
        max_running=max_running,
        max_tokens_per_step=max_tokens_per_step,
    )
    return Ledger((*weights_of(folder, family, modules, dtype=dtype).lines, *room.lines))


def room_of(
    model: Transformer | Shape, *, pages: int, page_size: int, max_running: int, max_tokens_per_step: int
) -> Ledger:
    """What an engine takes on top of weights that are in memory already."""
    config, dtype = model.config, model.dtype
    each = PagePool.bytes_per_page(config, page_size=page_size, dtype=dtype)
    workspace = _workspace(config, dtype, rows=max_running, tokens=max_tokens_per_step)
    return Ledger(
        (
            (f"{pages} pages of keys and values", pages * each),
            # One layer's pages as attention may gather them.
            ("workspace, about", workspace + pages * each // config.layers),
        )
    )


def weights_of(
    folder: Path, family: Family, modules: Iterable[str], *, dtype: torch.dtype, there: Collection[str] = ()
) -> Ledger:
    """What the weights of modules take, exactly; those of modules that are ``there`` are in memory already."""
    found = [family.module(name) for name in modules]
    whole = dict.fromkeys(module.weights for module in found if module.weights not in there)
    riding = [module for module in found if module.base is not None and module.name not in there]
    lines = [line for name in whole for line in _lines(folder, family, name, dtype)]
    for module in riding:
        lines.append((f"adapter {module.name}", adapter_bytes(module_folder(folder, module), dtype)))
    return Ledger(tuple(lines))


def _shapes_of(folder: Path, family: Family, weights: str) -> dict[str, Sequence[int]]:
    """Shapes of the tensors that are loaded of a checkpoint, by name."""
    path, tied = module_folder(folder, family.module(weights)), config_of(folder, family, weights).tied
    return {
        name: shape
        for name, shape in read_shapes(weight_files(path))
        if not (name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"))
    }


def _lines(folder: Path, family: Family, weights: str, dtype: torch.dtype) -> Iterator[tuple[str, int]]:
    """What a checkpoint takes, and what its codebooks take besides."""
    quantization = read_quantization(module_folder(folder, family.module(weights)))
    shapes = _shapes_of(folder, family, weights)
    yield f"weights of {weights}", loaded_bytes(shapes.items(), dtype, quantization)
    if quantization is not None:
        yield (
            f"copies of {weights} to multiply by, at most",
            copied_bytes(shapes.items(), dtype, quantization),
        )


def _workspace(config: ModelConfig, dtype: torch.dtype, *, rows: int, tokens: int) -> int:
    """Bytes of the largest step: what a block holds of every token, and the logits of every running request."""
    heads = (config.heads + 2 * config.kv_heads) * config.head_width
    block = 4 * config.width + 3 * config.mlp_width + 2 * heads
    return tokens * block * dtype.itemsize + rows * config.vocabulary * _SAMPLING


def available_memory(device: str = "cpu") -> int:
    """Bytes that this process can still take, on the machine or on its accelerator."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([_of_machine(), *_of_group()])


def _of_machine() -> int:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_group(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What a container may still take, where one is limited."""
    with suppress(OSError, ValueError):  # no such files, or no limit ("max")
        most = int((folder / "memory.max").read_text())
        return [max(0, most - int((folder / "memory.current").read_text()) + _reclaimable(folder))]
    return []


def _reclaimable(folder: Path) -> int:
    """Copies of files in memory count as used, and go when somebody needs the room."""
    lines = (folder / "memory.stat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
