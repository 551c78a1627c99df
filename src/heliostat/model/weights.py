"""Weights on disk (safetensors, Hugging Face layout) to a Transformer and back, and the digest that names them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from heliostat.errors import Refused
from heliostat.files import atomic_write_text, read_json, saving
from heliostat.linear.codebook import put_codebook
from heliostat.model.alpha import KEPT_WHOLE, format_of
from heliostat.model.config import ModelConfig
from heliostat.model.quantized import WEIGHT, Quantization, read_quantization
from heliostat.model.transformer import Transformer
from heliostat.ops.codebook import Coded

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DIGEST = "digest.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
CONFIG_KEYS = frozenset(
    {"torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache", "architectures"}
)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order; refuses pickles and missing shards by name."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        listed = _listed(folder / INDEX)
        missing = [name for name in listed if not (folder / name).is_file()]
        if missing or not listed:
            raise Refused(
                f"{folder / INDEX} names files that are not there: {', '.join(missing) or 'none listed'}"
            )
        return [folder / name for name in listed]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
    if pickles:
        raise Refused(
            f"{folder / pickles[0]} is a pickle, and heliostat opens none (it could run code); "
            "save the model as safetensors first: transformers' save_pretrained does"
        )
    raise Refused(f"{folder} has no {SINGLE} and no {INDEX}")


def _listed(index: Path) -> list[str]:
    """The files that an index names, each once; names of other folders are refused."""
    named = read_json(index).get("weight_map")
    names = list(named.values()) if isinstance(named, dict) else []
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name:
            raise Refused(f"{index} is damaged: {name!r} is no name of a file beside it")
    return sorted(set(names))


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of the files; a damaged file is refused by name."""
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise Refused(f"{file} is damaged or not safetensors: {error}") from error


def read_shapes(files: Iterable[Path]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every (name, shape) of the files, from their heads alone; a damaged file is refused by name."""
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield name, tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise Refused(f"{file} is damaged or not safetensors: {error}") from error


def refuse_not_finite(files: Iterable[Path]) -> None:
    """Refused, by file and tensor, where weights hold numbers that are none. Reads every byte."""
    for file in files:
        for name, tensor in read_tensors([file]):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                count = int((~tensor.isfinite()).sum())
                raise Refused(f"{file}: {name} holds {count} numbers that are not finite (nan or infinite)")


def load_transformer(
    folder: Path, config: ModelConfig, *, dtype: torch.dtype, device: str = "cpu", dense: bool = False
) -> Transformer:
    """The checkpoint in ``folder`` as a Transformer, frozen, in ``dtype``; missing or foreign tensors are refused.

    Linears in codebooks stay so, whatever ``dtype`` is; ``dense``: as plain ones, for who runs many tokens at once.
    """
    with torch.device("meta"):
        plain = {name: tuple(tensor.shape) for name, tensor in _tensors(Transformer(config))}
    quantization = read_quantization(folder)
    expected = plain if quantization is None else quantization.shapes(plain, Path(folder))
    found: dict[str, Tensor] = {}
    for name, tensor in read_tensors(weight_files(folder)):
        if name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight"):
            continue
        if name not in expected:
            raise Refused(
                f"{folder} holds the tensor {name!r}, which {config.architecture} as configured has not"
            )
        if tuple(tensor.shape) != expected[name]:
            raise Refused(f"{folder}: {name} is {tuple(tensor.shape)}, config.json asks for {expected[name]}")
        coded = quantization is not None and quantization.is_coded(name)
        found[name] = tensor.to(device=device, dtype=None if coded else format_of(name, dtype))
    missing = sorted(set(expected) - set(found))
    if missing:
        raise Refused(f"{folder} lacks {len(missing)} tensors, the first: {', '.join(missing[:3])}")
    if quantization is None:
        return assemble(config, found)
    return _assemble_coded(config, found, plain, quantization, Path(folder), dtype if dense else None)


def _assemble_coded(
    config: ModelConfig,
    found: dict[str, Tensor],
    plain: Mapping[str, tuple[int, ...]],
    quantization: Quantization,
    folder: Path,
    dense: torch.dtype | None,
) -> Transformer:
    """A Transformer with Linears in codebooks, or with what they stand for, in ``dense``."""
    coded: dict[str, Coded] = {}
    for path in quantization.linears:
        coded[path] = quantization.take(found, path, plain[path + WEIGHT][1], folder)
        if dense is not None:
            found[path + WEIGHT] = coded.pop(path).dense(dense)
    model = assemble(config, found)
    for path, linear in coded.items():
        put_codebook(model, path, linear)
    return model


def save_dense(source: Path, target: Path, config: ModelConfig) -> None:
    """Write what a checkpoint in codebooks stands for as an ordinary one, in the number format of its other tensors."""
    quantization = read_quantization(source)
    assert quantization is not None, source
    plain = (
        tensor.dtype for name, tensor in read_tensors(weight_files(source)) if not quantization.is_coded(name)
    )
    model = load_transformer(source, config, dtype=next(plain), dense=True)
    save_checkpoint(target, state_of(model), read_json(Path(source) / "config.json"))


def assemble(config: ModelConfig, state: Mapping[str, Tensor]) -> Transformer:
    """A frozen Transformer around these tensors (no copy); tied heads are tied."""
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(dict(state), strict=False, assign=True)
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    device = next(iter(state.values())).device
    fresh = Transformer.rotary(config)
    model.register_buffer("frequencies", fresh.to(device), persistent=False)
    return model.requires_grad_(False).eval()


def state_of(model: Transformer) -> dict[str, Tensor]:
    """The model's own tensors under their Hugging Face names, without adapters, tied head left out, sorted."""
    state = {
        name.replace(".inner.", "."): tensor.detach()
        for name, tensor in _tensors(model)
        if ".adapters." not in name
    }
    return dict(sorted(state.items()))


def _tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that are saved with them."""
    yield from model.named_parameters()
    yield from ((name, b) for name, b in model.named_buffers() if name.endswith(KEPT_WHOLE))


def format_on_disk(files: Iterable[Path]) -> torch.dtype:
    """The number format of a checkpoint: that of its first tensor that may have any."""
    return next(tensor.dtype for name, tensor in read_tensors(files) if not name.endswith(KEPT_WHOLE))


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file, whole or not at all."""
    with saving(path) as partial:
        save_file({n: t.contiguous() for n, t in tensors.items()}, str(partial), metadata={"format": "pt"})


def save_checkpoint(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write config.json and the weights as Hugging Face does, in shards of at most SHARD_BYTES."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(state))
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        save_tensors(shard, folder / name)
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for t in state.values())
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        atomic_write_text(folder / INDEX, json.dumps(index, indent=1))
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    facts = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": dtype}
    atomic_write_text(folder / "config.json", json.dumps(facts, indent=2) + "\n")


def _shards(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in state.items():
        count = tensor.numel() * tensor.element_size()
        if shard and size + count > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name], size = tensor, size + count
    yield shard


def digest_tensors(tensors: Iterable[tuple[str, Tensor]], facts: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over ``facts`` and every (name, dtype, shape, bytes), by name."""
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    parts = {name: _digest_tensor(name, tensor) for name, tensor in tensors}
    for name in sorted(parts):
        total.update(parts[name])
    return total.hexdigest()


def _digest_tensor(name: str, tensor: Tensor) -> bytes:
    head = f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode()
    part = hashlib.sha256(head)
    part.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return part.digest()


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """What of config.json belongs to the digest: all but what changes nothing; and what lies in codebooks, and how."""
    config = read_json(Path(folder) / "config.json")
    facts = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    quantization = read_quantization(folder)
    return facts if quantization is None else facts | {"quantization": quantization.facts}


def digest_folder(folder: Path, files: list[Path], facts: Mapping[str, Any], *, fresh: bool = False) -> str:
    """Digest of a module's files; the last one is remembered beside them and believed while sizes and times agree."""
    stamps = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in files}
    note = Path(folder) / DIGEST
    facts_text = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if not fresh:
        with suppress(Refused, KeyError):  # no note, or a damaged one: as if there were none
            cached = read_json(note)
            if cached["files"] == stamps and cached["facts"] == facts_text:
                return str(cached["digest"])
    digest = digest_tensors(read_tensors(files), facts)
    with suppress(Refused, OSError):  # a family on a read-only disk is read every time, and that is all
        atomic_write_text(note, json.dumps({"digest": digest, "files": stamps, "facts": facts_text}))
    return digest
