"""A family on disk and its modules in memory: reading, writing, checking digests, loading what a row needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from heliostat.errors import Refused
from heliostat.family import BASE, SHARINGS, Family, Module, Row
from heliostat.files import atomic_directory, atomic_write_text, locked, read_json
from heliostat.linear.adapter import adapter_file, adapter_parameters, digest_adapter, load_adapter
from heliostat.linear.lora import Route, parts_of, remove_adapter, whole
from heliostat.model.config import ModelConfig, read_config
from heliostat.model.quantized import read_quantization
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.transformer import Attend, Tape, Transformer
from heliostat.model.weights import (
    DIGEST,
    checkpoint_facts,
    digest_folder,
    load_transformer,
    refuse_not_finite,
    weight_files,
)

FAMILY = "family.json"
MODULES = "modules"
RUNS = "runs"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A module in memory. Modules that are adapters on the same weights hold the same ``model`` object."""

    name: str
    digest: str
    weights: str
    model: Transformer
    adapter: str | None = None
    tape: Tape | None = None
    """Which of its branches carry gradient; None: all."""

    def run(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states of a pass that runs this module alone (see ``Transformer.forward``)."""
        return self.model(ids, positions, attend, self.route, self.tape)

    @property
    def route(self) -> Route:
        """The route of a pass that runs this module alone."""
        return whole(self.adapter)


def read_family(folder: Path) -> Family:
    """The family in ``folder``; a folder without one is refused with the command that makes it."""
    path = Path(folder) / FAMILY
    if not path.is_file():
        raise Refused(f"{folder} is no family (no {FAMILY}); make one: heliostat init {folder} --base PATH")
    return Family.from_json(read_json(path))


def write_family(folder: Path, family: Family) -> None:
    """Replace family.json, whole or not at all."""
    atomic_write_text(Path(folder) / FAMILY, json.dumps(family.to_json(), indent=2) + "\n")


def changing(folder: Path) -> AbstractContextManager[None]:
    """Hold this while reading, changing and writing family.json, so that two commands at once lose nothing."""
    return locked(Path(folder) / f"{FAMILY}.lock")


def init_family(folder: Path, base: Path) -> Family:
    """Make a family around an ordinary Hugging Face checkpoint, which is copied into it."""
    folder, base = Path(folder), Path(base)
    if (folder / FAMILY).exists():
        raise Refused(f"{folder} is already a family; choose another folder, or remove it first")
    if not base.is_dir():
        raise Refused(f"{base} is no folder; --base takes a Hugging Face checkpoint on this disk")
    config = read_config(base)
    if read_quantization(base) is not None:
        raise Refused(
            f"{base} lies in codebooks: a family begins with the whole weights, and heliostat quantize adds others"
        )
    files = weight_files(base)
    tokenizer = Tokenizer.load(base)
    tokenizer.refuse_broken_template()
    _check_vocabulary(tokenizer, config)
    load_transformer(
        base, config, dtype=torch.bfloat16
    )  # refuses missing or foreign tensors before anything is copied
    refuse_not_finite(files)
    # As a whole or not at all: a base without its family.json would be in the way of the next init.
    with atomic_directory(folder) as partial:
        (partial / BASE).mkdir()
        for file in sorted({*files, *(p for p in base.iterdir() if p.is_file() and _belongs(p))}):
            shutil.copy2(file, partial / BASE / file.name)
        family = Family({BASE: _described(partial / BASE, config)}, {}, tokenizer.digest)
        write_family(partial, family)
    return family


def _described(base: Path, config: ModelConfig) -> Module:
    digest = digest_folder(base, weight_files(base), checkpoint_facts(base))
    return Module(BASE, BASE, digest, parameters=config.parameters)


def _belongs(path: Path) -> bool:
    """Small files of a checkpoint: configuration, tokenizer, template, card, licence; never weights or pickles."""
    named = path.name.lower().startswith(("license", "licence", "notice", "readme"))
    if path.name == DIGEST:
        return False  # somebody else's note about files is not believed
    return (
        named
        or (path.suffix in (".json", ".jinja", ".model", ".txt") and not path.name.endswith(".index.json"))
        or (path.name.endswith(".safetensors.index.json"))
    )


def _check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.size > config.vocabulary:
        raise Refused(f"the tokenizer has {tokenizer.size} tokens, the model only {config.vocabulary}")
    if strange := [token for token in tokenizer.eos_ids if not 0 <= token < config.vocabulary]:
        raise Refused(
            f"eos_token_id {', '.join(map(str, strange))} is no token of the model, whose ids are 0 to "
            f"{config.vocabulary - 1}: mend generation_config.json or tokenizer_config.json"
        )


def module_folder(folder: Path, module: Module) -> Path:
    return Path(folder) / module.path


def new_module_folder(folder: Path, family: Family, name: str) -> str:
    """Where a new module's files go, relative to ``folder``; call it while ``changing`` is held.

    What a process left there that died before it wrote family.json goes: no family names it.
    """
    assert name not in family.modules, name
    path = f"{MODULES}/{name}"
    shutil.rmtree(Path(folder) / path, ignore_errors=True)
    return path


def module_digest(folder: Path, family: Family, name: str, *, fresh: bool = False) -> str:
    """Digest of a module's files as they are now; ``fresh`` reads every byte again."""
    module = family.module(name)
    path = module_folder(folder, module)
    if module.base is not None:
        return digest_adapter(path, module_digest(folder, family, module.base, fresh=fresh), fresh=fresh)
    return digest_folder(path, weight_files(path), checkpoint_facts(path), fresh=fresh)


def describe_module(folder: Path, name: str, path: str, *, base: str | None, family: Family) -> Module:
    """The family's entry for a module whose files lie in ``path`` (relative): digest and size are computed."""
    full = Path(folder) / path
    if base is None:
        digest = digest_folder(full, weight_files(full), checkpoint_facts(full))
        quantization = read_quantization(full)
        format = None if quantization is None else str(quantization.format)
        return Module(name, path, digest, quantization=format, parameters=read_config(full).parameters)
    digest = digest_adapter(full, family.module(base).digest)
    return Module(name, path, digest, base=base, parameters=adapter_parameters(full))


def verify_module(folder: Path, family: Family, name: str, *, fresh: bool = False) -> None:
    """Refuse a module whose files, or whose weights' files, are not those the family remembers."""
    base = family.module(name).base
    if base is not None:
        verify_files(folder, family, base, fresh=fresh)
    verify_files(folder, family, name, fresh=fresh)


def verify_files(folder: Path, family: Family, name: str, *, fresh: bool = False) -> None:
    """Refuse a module whose own files changed; the weights under an adapter are taken as remembered."""
    module = family.module(name)
    path = module_folder(folder, module)
    if module.base is None:
        now = module_digest(folder, family, name, fresh=fresh)
    else:
        now = digest_adapter(path, family.module(module.base).digest, fresh=fresh)
    if now == module.digest:
        return
    users = sorted(family.users(name))
    mend = "put the original files back, or "
    if name == BASE:
        mend += f"make a new family from the changed ones: heliostat init NEW --base {path}"
    elif module.quantization is not None:
        mend += f"make another: heliostat quantize {folder} --format {module.quantization} --name NEW --data CALIB"
    else:
        mend += (
            f"train again what uses it (first heliostat member rm {folder} {users[0] if users else 'MEMBER'})"
        )
    raise Refused(
        f"module {name!r} changed: family.json has digest {module.digest[:12]}, its files have {now[:12]}. "
        f"Members tuned with it ({', '.join(users) or 'none'}) would answer wrongly; {mend}"
    )


def refuse_broken(folder: Path, module: Module) -> None:
    """Refuse a module whose own files hold numbers that are none. Reads every byte."""
    path = module_folder(folder, module)
    refuse_not_finite(weight_files(path) if module.base is None else [adapter_file(path)])


def verify_member(family: Family, name: str, *, folder: str | Path = "FAM") -> None:
    """Refuse a member whose row now points to other weights, or names other modules, than it was tuned with.

    ``folder`` is the family's, so that the command in the refusal can be pasted.
    """
    member = family.member(name)
    again = f"heliostat train {folder} --member NEW --sharing {member.sharing} --data DATA"
    for module, digest in member.digests.items():
        if module in family.modules and family.module(module).digest != digest:
            raise Refused(
                f"member {name!r} was tuned with {module!r} of digest {digest[:12]}, the family now has "
                f"{family.module(module).digest[:12]}: tune it again ({again}{frozen_words(member.row, member.sharing)})"
            )
    strange = [module for module in member.row.modules if member.digests and module not in member.digests]
    if strange:
        tuned = [module for module in member.digests if module not in member.row.modules]
        raise Refused(
            f"member {name!r} was tuned with {', '.join(tuned) or 'other modules'}, and its row names "
            f"{', '.join(strange)}: it would answer worse than it was taught to. Give it back its row in family.json, or "
            f"tune one for this row: {again}{frozen_words(member.row, member.sharing)}"
        )


def frozen_words(row: Row, sharing: str) -> str:
    """The options of `heliostat train` that name the frozen modules of a row; nothing where they are the base."""
    words = []
    for option, parts in SHARINGS[sharing].frozen.items() if sharing in SHARINGS else ():
        named = getattr(row, parts[0])
        words += [f" --{option} {named}"] if named != BASE else []
    return "".join(words)


def load_modules(
    folder: Path,
    family: Family,
    names: Iterable[str],
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    verify: bool = True,
    models: Mapping[str, Transformer] | None = None,
    joined: bool = False,
    dense: bool = False,
) -> dict[str, Loaded]:
    """The named modules in memory, frozen; each set of weights is loaded once, adapters are put on it.

    ``models``: weights that are in memory already, by their module's name; they are not loaded again.
    ``joined``: for serving, Linears of one input run as one (``Transformer.join``). ``dense``: for training, Linears in
    codebooks are loaded as what they stand for.
    """
    models = dict(models or {})
    loaded: dict[str, Loaded] = {}
    for name in dict.fromkeys(names):
        module = family.module(name)
        if verify:
            verify_module(folder, family, name)
        if module.weights not in models:
            path = module_folder(folder, family.module(module.weights))
            config = read_config(path)
            models[module.weights] = load_transformer(path, config, dtype=dtype, device=device, dense=dense)
        model = models[module.weights]
        if module.base is not None:
            if parts_of(model, name):  # of weights in memory already: somebody may be using it
                raise Refused(f"module {name!r} is loaded already: unload it first")
            load_adapter(module_folder(folder, module), model, name)
        loaded[name] = Loaded(name, module.digest, module.weights, model, name if module.base else None)
    if joined:
        for model in models.values():
            model.join()
    return loaded


def take_off(model: Transformer, adapter: str) -> None:
    """Give up the memory of an adapter that was loaded on ``model``."""
    remove_adapter(model, adapter)


def load_tokenizer(folder: Path, family: Family) -> Tokenizer:
    """The family's one tokenizer, its digest checked."""
    tokenizer = Tokenizer.load(Path(folder) / BASE)
    if tokenizer.digest != family.tokenizer:
        raise Refused(
            f"the tokenizer in {Path(folder) / BASE} changed: family.json has digest {family.tokenizer[:12]}, "
            f"its files have {tokenizer.digest[:12]}; put the original files back"
        )
    return tokenizer


def best_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32 (emulated bfloat16 is many times slower)."""
    if device != "cpu":
        return torch.bfloat16
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return torch.bfloat16 if native else torch.float32


def device_named(name: str) -> str:
    """A device of torch by name; ``auto`` is cuda where torch sees one, else cpu. Refused with what torch sees."""
    seen = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if name == "auto":
        return "cuda" if len(seen) > 1 else "cpu"
    if name in seen or (name == "cuda" and len(seen) > 1):
        return name
    raise Refused(f"device is {name!r}; torch sees here: {', '.join(seen)} (or say auto)")


def config_of(folder: Path, family: Family, module: str = BASE) -> ModelConfig:
    """Shape of a module: that of the weights it runs on."""
    return read_config(module_folder(folder, family.module(family.module(module).weights)))


def modules_of(family: Family, members: Iterable[str]) -> list[str]:
    """Every module that the rows of these members name, each once."""
    rows: Mapping[str, None] = dict.fromkeys(name for m in members for name in family.row(m).modules)
    return list(rows)
