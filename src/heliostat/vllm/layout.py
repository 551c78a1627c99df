"""Modules of a family as vLLM loads them: checkpoints with a tokenizer, plain LoRAs in PEFT's format; written once each.

They lie in the family under ``exports/vllm``, by digest. Weights are not copied where the disk can give a file two names.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from heliostat.build import BASE, load_tokenizer, module_folder, verify_module
from heliostat.engine.fitting import fit_of
from heliostat.errors import Refused
from heliostat.export import LICENCES, TOKENIZER
from heliostat.family import Family, Module, Row
from heliostat.files import atomic_directory, atomic_write_text, read_json
from heliostat.linear.adapter import CONFIG, LOW_RANK, PREFIX, WEIGHTS, Saved, read_adapter
from heliostat.model.config import ARCHITECTURES, read_config
from heliostat.model.weights import INDEX, save_tensors, weight_files
from heliostat.vllm.launch import TWO_STREAMS, Hosted

EXPORTS = "exports/vllm"
EMBEDDED = "serve this family with the embedded engine: heliostat serve, without --engine vllm"


def prepared(
    folder: Path, family: Family, names: Iterable[str], out: Path | None = None
) -> dict[str, Hosted]:
    """These modules in vLLM's layout, each written if it is not there, their files checked first.

    ``out``: where; the family's ``exports/vllm`` if None. Raises Refused for what vLLM cannot load.
    """
    folder, found = Path(folder), {}
    for name in dict.fromkeys(names):
        module = family.module(name)
        refuse_unknown(folder, family, name)
        verify_module(folder, family, name)
        target = _place(folder, out, module.digest)
        if not target.is_dir():
            with atomic_directory(target) as partial:
                _write(folder, family, module, partial)
        rank = 0 if module.base is None else int(read_json(target / CONFIG)["r"])
        found[name] = Hosted(name=name, digest=module.digest, folder=str(target), rank=rank)
    return found


def zero_adapter(folder: Path, family: Family, weights: str, out: Path | None = None) -> str:
    """Folder of an adapter that changes nothing of these weights, written if it is not there."""
    folder = Path(folder)
    target = _place(folder, out, hashlib.sha256(f"zero {family.module(weights).digest}".encode()).hexdigest())
    if not target.is_dir():
        inputs, outputs = read_config(module_folder(folder, family.module(weights))).linears["q_proj"]
        path = "model.layers.0.self_attn.q_proj"
        with atomic_directory(target) as partial:
            _write_lora(partial, {path: (torch.zeros(8, inputs), torch.zeros(outputs, 8))})
    return str(target)


def fit(folder: Path, family: Family, *, dtype: str, page_size: int, tensor_parallel: int = 1) -> str:
    """``Launch.fit``: digest of all that must be equal before keys and values may travel between two vLLM workers."""
    config, tokenizer = read_config(Path(folder) / BASE), load_tokenizer(Path(folder), family).digest
    inner = fit_of(config, tokenizer=tokenizer, dtype=dtype, page_size=page_size)
    return hashlib.sha256(f"vllm {inner} {tensor_parallel}".encode()).hexdigest()


def architecture(folder: Path, family: Family, weights: str) -> str:
    """``Launch.architecture`` of a checkpoint: the name of its class in transformers and in vLLM."""
    config = read_config(module_folder(Path(folder), family.module(weights)))
    return ARCHITECTURES[config.architecture].class_name


def refuse_unknown(folder: Path, family: Family, name: str) -> None:
    """Raise Refused for a module whose attention or whose weights vLLM has no layers for."""
    module = family.module(name)
    if module.quantization is not None:
        raise Refused(
            f"module {name!r} lies in codebooks ({module.quantization}), which vLLM has no products for; {EMBEDDED}"
        )
    kind = read_config(module_folder(folder, family.module(module.weights))).attention
    if not kind.plain:
        raise Refused(
            f"module {name!r} has attention {kind.name!r}: its pages hold sums beside keys and values, and vLLM's "
            f"do not; {EMBEDDED}"
        )


def refuse_unfit(folder: Path, family: Family, rows: Mapping[str, Row]) -> None:
    """Raise Refused for the first of these members that vLLM cannot play."""
    for member, row in rows.items():
        for name in row.modules:
            refuse_unknown(Path(folder), family, name)
        if row.two_rows:
            _refuse_two_rows(Path(folder), family, member, row)


def _refuse_two_rows(folder: Path, family: Family, member: str, row: Row) -> None:
    speaker, writer = family.module(row.speaker), row.answer_writer
    if speaker.base != writer or row.prompt_writer != writer:
        raise Refused(
            f"member {member!r}: {row.speaker!r} speaks over what {writer!r} writes; on vLLM a speaker is an adapter on "
            f"who writes prompt and answer; {EMBEDDED}"
        )
    if row.first_speaker != row.speaker:
        raise Refused(
            f"member {member!r}: its first token is another module's, which two streams do not do; {EMBEDDED}"
        )
    if (found := architecture(folder, family, writer)) not in TWO_STREAMS:
        raise Refused(f"member {member!r}: two streams of {found} are not known; {EMBEDDED}")


def _place(folder: Path, out: Path | None, digest: str) -> Path:
    return (Path(folder) / EXPORTS if out is None else Path(out)) / digest[:16]


def _write(folder: Path, family: Family, module: Module, target: Path) -> None:
    source = module_folder(folder, module)
    if module.base is not None:
        inputs = read_config(module_folder(folder, family.module(module.weights))).linears
        return _write_lora(target, _uniform(read_adapter(source), inputs))
    index = [source / INDEX] if (source / INDEX).exists() else []
    for file in [*weight_files(source), *index]:
        _link(file, target / file.name)
    named = {"architectures": [architecture(folder, family, module.name)]}  # some checkpoints leave it out
    config = {**named, **read_json(source / "config.json")}
    atomic_write_text(target / "config.json", json.dumps(config, indent=2) + "\n")
    for file in sorted((folder / BASE).iterdir()):
        if file.is_file() and file.name.lower().startswith((*TOKENIZER, *LICENCES)):
            shutil.copy2(file, target / file.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one that gives a file one name only
        shutil.copy2(source, target)


def _uniform(
    saved: Mapping[str, Saved], linears: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by path, all of one rank and scale 1: vLLM reads one rank and one alpha for all."""
    rank = max(part.b.shape[1] for part in saved.values())
    found = {}
    for path, part in saved.items():
        a = part.a
        if a is None:
            assert part.columns is not None
            width = linears[path.rsplit(".", 1)[-1]][0]
            a = torch.zeros(part.columns.numel(), width).scatter_(1, part.columns.cpu()[:, None], 1)
        more = rank - a.shape[0]
        down = torch.nn.functional.pad(a.float(), (0, 0, 0, more))
        found[path] = down, torch.nn.functional.pad(part.b.float() * part.scale, (0, more))
    return found


def _write_lora(target: Path, parts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    rank = next(iter(parts.values()))[0].shape[0]
    tensors = {}
    for path, (a, b) in parts.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.contiguous()
    targets = sorted({path.rsplit(".", 1)[-1] for path in parts})
    facts = {
        **LOW_RANK,
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
    }
    save_tensors(tensors, target / WEIGHTS)
    atomic_write_text(target / CONFIG, json.dumps(facts, indent=2) + "\n")
