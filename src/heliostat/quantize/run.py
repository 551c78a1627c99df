"""Quantize a module of a family: layer by layer, kept as it goes, and a new module of the family at the end.

What a layer came to lies in ``FAM/quantizing/NAME/layer-00000``; killed at any time, the same command goes on behind the
last whole one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heliostat.build import (
    BASE,
    RUNS,
    changing,
    describe_module,
    load_modules,
    load_tokenizer,
    module_folder,
    new_module_folder,
    read_family,
    verify_module,
    write_family,
)
from heliostat.engine.ledger import Ledger, available_memory
from heliostat.errors import Refused
from heliostat.family import Family, Module
from heliostat.files import atomic_directory, atomic_write_text, locked, read_json, read_yaml
from heliostat.model.config import ModelConfig, read_config
from heliostat.model.quantized import PARTS, Quantization, coded_tensors
from heliostat.model.transformer import Transformer
from heliostat.model.weights import read_tensors, save_checkpoint, save_tensors, weight_files
from heliostat.ops.codebook import Coded
from heliostat.ops.codebook_format import Format
from heliostat.quantize.blocks import Layer, Stream, linears_of, put_layer, quantize_block
from heliostat.quantize.calibration import Calibration, read_calibration
from heliostat.quantize.fit import Effort
from heliostat.train.text import text_loss

QUANTIZING = "quantizing"
"""Folder of a family in which unfinished work lies."""
PLAN, TENSORS, ERRORS = "plan.json", "layer.safetensors", "errors.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is quantized, how, and on what."""

    family: str
    name: str
    """Of the new module."""
    format: str
    data: str
    module: str = BASE
    tokens: int = 32_768
    """Of calibration, at most."""
    tuning_steps: int = 64
    """In which each block is tuned as a whole."""
    effort: Effort = field(default_factory=Effort)
    seed: int = 0

    def __post_init__(self) -> None:
        for what, value, least in (
            ("tokens", self.tokens, 1),
            ("tuning_steps", self.tuning_steps, 0),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise Refused(f"{what} is {value}; it must be at least {least}")


@dataclass(frozen=True, slots=True)
class Quantized:
    """What it came to."""

    module: Module
    format: str
    source: str
    bits: float
    """Of a quantized weight on average, codebooks and scales included."""
    linear_bytes: tuple[int, int]
    """That the Linears take: as they were kept, and now."""
    errors: tuple[Mapping[str, float], ...]
    """By layer; see ``blocks.Layer``."""
    loss: tuple[float, float]
    """Nats a token on held-out rows, before and after."""
    tokens: int
    held_out_tokens: int
    seconds: float

    @property
    def perplexity(self) -> tuple[float, float]:
        """On held-out rows, before and after."""
        before, after = torch.tensor(self.loss, dtype=torch.float64).exp().tolist()
        return before, after

    def to_json(self) -> dict[str, Any]:
        """Everything, in plain values."""
        return asdict(self) | {"perplexity": list(self.perplexity)}


Tell = Callable[[int, int, str], None]
"""Hears (layers done, layers in all, what is being done)."""


def quantize(
    wish: Wish,
    *,
    tell: Tell = lambda done, total, what: None,
    echo: Callable[[str], None] = lambda line: None,
) -> Quantized:
    """Make ``wish.name`` of ``wish.module`` and add it to the family; unfinished work of the same wish goes on.

    Raises Refused before anything is computed where wish, data or family do not fit.
    """
    begin = time.perf_counter()
    folder = Path(wish.family)
    family = read_family(folder)
    family.free_module_name(wish.name)
    source, config = source_of(folder, family, wish)
    tokenizer = load_tokenizer(folder, family)
    data = read_calibration(Path(wish.data), tokenizer, config, tokens=wish.tokens, seed=wish.seed)
    refuse_too_large(config, data)
    place = folder / QUANTIZING / wish.name
    place.mkdir(parents=True, exist_ok=True)
    with locked(place / "run.lock", wait=False):
        read_family(folder).free_module_name(wish.name)  # another may have ended meanwhile
        _keep_plan(place, wish, source.digest, data)
        model = load_modules(folder, family, [wish.module], dtype=torch.float32, verify=False)[
            wish.module
        ].model
        layers, loss = _all_layers(place, wish, model, data, kind=_kind(folder, source), tell=tell, echo=echo)
        made = _result(
            wish, source, config, layers, loss, data, time.perf_counter() - begin, _kind(folder, source)
        )
        made = replace(made, module=_publish(folder, wish, source, layers, made))
        shutil.rmtree(place, ignore_errors=True)
    return made


def source_of(folder: Path, family: Family, wish: Wish) -> tuple[Module, ModelConfig]:
    """The module that is quantized, and its shape. Refused where it is none that could be, or the format does not fit it."""
    source = family.module(wish.module)
    if source.base is not None:
        raise Refused(
            f"module {wish.module!r} is an adapter on {source.base!r}: only whole modules are quantized; quantize "
            f"{source.base!r}, and tune on it"
        )
    if source.quantization is not None:
        raise Refused(
            f"module {wish.module!r} is quantized already ({source.quantization}): quantize what it was made of"
        )
    format, config = Format.parse(wish.format), read_config(module_folder(folder, source))
    for name, (inputs, _) in config.linears.items():
        if inputs % format.v or (format.g is not None and inputs % format.g):
            widths = sorted({wide for wide, _ in config.linears.values()})
            raise Refused(
                f"format {wish.format}: {name} has {inputs} inputs, which vectors of {format.v} and groups of "
                f"{format.g or 'a row'} do not divide; inputs here are {', '.join(map(str, widths))}"
            )
    verify_module(folder, family, wish.module)
    return source, config


def refuse_too_large(config: ModelConfig, data: Calibration) -> None:
    """Refuse what does not fit into memory: the module in float32, what stands before and behind a block, its X^T X."""
    widest = max(max(sides) for sides in config.linears.values())
    inputs = sum(config.linears[name][0] ** 2 for name in ("q_proj", "o_proj", "gate_proj", "down_proj"))
    lines = (
        ("the module, in float32", 4 * config.parameters),
        (f"{data.tokens:,} tokens of calibration between blocks", 3 * 4 * data.tokens * config.width),
        ("inputs of a block's Linears, squared", 8 * inputs),
        ("fitting one Linear, about", 16 * 4 * widest * config.width),
    )
    Ledger(lines).refuse_over(available_memory(), remedy="Lower --tokens, or take a machine with more memory")


def _kind(folder: Path, source: Module) -> torch.dtype:
    return next(read_tensors(weight_files(module_folder(folder, source))))[1].dtype


def _keep_plan(place: Path, wish: Wish, digest: str, data: Calibration) -> None:
    """Write down what is being made; refuse to go on with what was begun otherwise."""
    facts = {key: value for key, value in asdict(wish).items() if key not in ("family", "data")}
    ids = torch.cat([data.fitted.ids.flatten(), data.held_out.ids.flatten()]).contiguous()
    facts |= {"digest": digest, "data": hashlib.sha256(ids.numpy().tobytes()).hexdigest()}
    path = place / PLAN
    if not path.is_file():
        return atomic_write_text(path, json.dumps(facts) + "\n")
    kept = read_json(path)
    if changed := sorted(key for key in facts if kept.get(key) != facts[key]):
        raise Refused(
            f"{place} holds an unfinished quantization that was begun with other {', '.join(changed)}: say what was said "
            "then, choose another --name, or remove that folder to give it up"
        )
    return None


def _all_layers(
    place: Path,
    wish: Wish,
    model: Transformer,
    data: Calibration,
    *,
    kind: torch.dtype,
    tell: Tell,
    echo: Callable[[str], None],
) -> tuple[list[Layer], tuple[float, float]]:
    """Every layer, read where it is kept and else fitted; and the loss before and after. The model ends as what was made."""
    total, layers = len(model.blocks), list[Layer]()
    tell(0, total, "measures the module as it is")
    before = text_loss(model, data.held_out, batch=8)
    if not torch.tensor(before).isfinite():
        raise Refused(
            f"module {wish.module!r} has a loss of {before} on the calibration data: it does not work on them"
        )
    stream = Stream.begun(model, data.fitted)
    format = Format.parse(wish.format)
    for number, block in enumerate(model.blocks):
        kept = place / f"layer-{number:05}"
        layer = _read_layer(kept, format, linears_of(block), echo)
        if layer is None:
            layer = quantize_block(
                stream,
                number,
                format,
                seed=wish.seed,
                steps=wish.tuning_steps,
                effort=wish.effort,
                kind=kind,
                tell=partial(tell, number, total),
            )
            _write_layer(kept, layer)
        elif number == 0:
            echo(f"going on with what is in {place}")
        put_layer(block, layer.coded, layer.norms)
        stream.x = stream.through(block)
        layers.append(layer)
        tell(number + 1, total, f"error {layer.errors['tuned']:.4f}")
    return layers, (before, text_loss(model, data.held_out, batch=8))


def _write_layer(kept: Path, layer: Layer) -> None:
    tensors = {f"{path}.weight": weight for path, weight in layer.norms.items()}
    for path, coded in layer.coded.items():
        tensors |= coded_tensors(path, coded)
    with atomic_directory(kept) as partial:
        save_tensors(tensors, partial / TENSORS)
        atomic_write_text(partial / ERRORS, json.dumps(dict(layer.errors)) + "\n")


def _read_layer(
    kept: Path, format: Format, linears: Mapping[str, torch.nn.Linear], echo: Callable[[str], None]
) -> Layer | None:
    """A layer that was fitted before; None where there is none, or none that can be read."""
    if not kept.is_dir():
        return None
    try:
        tensors = dict(read_tensors([kept / TENSORS]))
        coded = {
            path: Coded(format, linear.in_features, *(tensors.pop(f"{path}.{part}") for part in PARTS))
            for path, linear in linears.items()
        }
        norms = {name.removesuffix(".weight"): tensor for name, tensor in tensors.items()}
        return Layer(coded, norms, {key: float(value) for key, value in read_json(kept / ERRORS).items()})
    except (Refused, KeyError, TypeError, ValueError) as error:
        echo(f"{kept} is damaged and is made again: {error}")
        shutil.rmtree(kept)
        return None


def _result(
    wish: Wish,
    source: Module,
    config: ModelConfig,
    layers: list[Layer],
    loss: tuple[float, float],
    data: Calibration,
    seconds: float,
    kind: torch.dtype,
) -> Quantized:
    format = Format.parse(wish.format)
    sides = list(config.linears.values()) * config.layers
    weights = sum(inputs * outputs for inputs, outputs in sides)
    size = sum(format.bytes(outputs, inputs) for inputs, outputs in sides)
    return Quantized(
        module=source,
        format=str(format),
        source=wish.module,
        bits=8 * size / weights,
        linear_bytes=(kind.itemsize * weights, size),
        errors=tuple(dict(layer.errors) for layer in layers),
        loss=loss,
        tokens=data.tokens,
        held_out_tokens=data.held_out.ids.numel(),
        seconds=round(seconds, 1),
    )


def _publish(folder: Path, wish: Wish, source: Module, layers: list[Layer], made: Quantized) -> Module:
    """Write the module, then the family's entry; a crash between the two leaves a folder that nobody names."""
    with changing(folder):
        family = read_family(folder)
        family.free_module_name(wish.name)
        origin = module_folder(folder, family.module(wish.module))
        path = new_module_folder(folder, family, wish.name)
        linears = [f"model.layers.{n}.{name}" for n, layer in enumerate(layers) for name in layer.coded]
        report = {
            "errors": list(made.errors),
            "perplexity": list(made.perplexity),
            "tokens": made.tokens,
            "bits": made.bits,
            "wish": {
                k: v for k, v in asdict(wish).items() if k in ("tokens", "tuning_steps", "seed", "effort")
            },
        }
        told = {"module": wish.module, "digest": source.digest}
        with atomic_directory(folder / path) as partial:
            save_checkpoint(partial, _state(origin, layers), read_json(origin / "config.json"))
            Quantization(Format.parse(wish.format), tuple(sorted(linears)), told, report).write(partial)
        module = describe_module(folder, wish.name, path, base=None, family=family)
        write_family(folder, family.with_module(module))
    return module


def remove_module(folder: Path, name: str) -> None:
    """Take a quantized module that no member uses out of the family, with its files. Refused for any other."""
    folder = Path(folder)
    with changing(folder):
        family = read_family(folder)
        path = module_folder(folder, family.module(name))
        left = family.without_module(name)
        if run := _tuned_with(folder, family, name):
            raise Refused(
                f"module {name!r} is what {run} tunes through, and that has not ended: let it end, or remove it"
            )
        write_family(folder, left)
    shutil.rmtree(path, ignore_errors=True)


def _tuned_with(folder: Path, family: Family, name: str) -> Path | None:
    """The folder of a run that has not ended and has this module as a frozen half."""
    for path in sorted((folder / RUNS).glob("*/recipe.yaml")):
        if path.parent.name in family.members:
            continue
        asked = read_yaml(path, what="recipe of a run")
        if name in (asked.get("speaker"), asked.get("writer")):
            return path.parent
    return None


def _state(origin: Path, layers: list[Layer]) -> dict[str, Tensor]:
    """The tensors of the new module: what is not in a layer is the source's own, as it is kept there."""
    made: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        for path, weight in layer.norms.items():
            made[f"model.layers.{number}.{path}.weight"] = weight
        for path, coded in layer.coded.items():
            made |= coded_tensors(f"model.layers.{number}.{path}", coded)
    gone = {name.removesuffix(".codes") + ".weight" for name in made if name.endswith(".codes")}
    kept = {name: tensor for name, tensor in read_tensors(weight_files(origin)) if name not in gone}
    # What decides the number format that config.json tells stands first: the embedding is sorted before all layers.
    return dict(sorted((kept | made).items()))
