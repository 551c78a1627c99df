"""Members out of a family and models into it: Hugging Face folders and PEFT adapters, with a card that tells the truth."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from heliostat.build import (
    BASE,
    RUNS,
    Loaded,
    changing,
    describe_module,
    load_modules,
    load_tokenizer,
    module_folder,
    new_module_folder,
    read_family,
    refuse_broken,
    verify_module,
    write_family,
)
from heliostat.card import card, licence_of
from heliostat.errors import Refused
from heliostat.family import PARTS, Family, Member, Module, Row, own_module_name
from heliostat.files import atomic_directory, atomic_write_text, locked, read_json
from heliostat.linear.adapter import (
    CONFIG,
    adapter_file,
    columns_as_lora,
    is_adapter,
    is_columns,
    read_adapter,
)
from heliostat.model.config import read_config
from heliostat.model.quantized import QUANTIZATION
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.weights import INDEX, save_dense, weight_files
from heliostat.train.checkpoint import checkpoints

FACTS = "heliostat.json"
LICENCES = ("license", "licence", "notice")
TOKENIZER = (
    "tokenizer",
    "chat_template",
    "special_tokens_map",
    "generation_config",
    "vocab",
    "merges",
    "added_tokens",
)


def export_member(folder: Path, member: str, out: Path, *, dequantize: bool = False) -> Path:
    """Write the member's own half to ``out``: weights or adapter, tokenizer, card, licence, row, reproducing script.

    ``dequantize``: where the other half lies in codebooks, what it stands for is written as a checkpoint beside it, in
    ``base``. Raises Refused where ``out`` exists, where the row has more than one module of its own or of others, where
    there are codebooks and ``dequantize`` is not said, or where files changed.
    """
    folder, out = Path(folder), Path(out)
    family = read_family(folder)
    row = family.member(member).row
    own, other = _halves(family, member)
    coded = other.quantization is not None
    if coded and not dequantize:
        raise Refused(
            f"{member!r} was tuned with {other.name!r}, whose weights lie in codebooks ({other.quantization}) that no other "
            "library reads: say --dequantize, and what they stand for is written, too, in 16 bits or as the base has it"
        )
    if out.exists():
        raise Refused(f"{out} is already there; choose another folder, or remove it first")
    for name in row.modules:
        verify_module(folder, family, name)
    facts = _facts(folder, family, member, own.name, other)
    with atomic_directory(out) as partial:
        _write_weights(folder, module_folder(folder, own), partial)
        _copy_matching(folder / BASE, partial, TOKENIZER if own.base is None else ())
        _copy_matching(folder / BASE, partial, LICENCES)
        if coded:
            source = module_folder(folder, other)
            save_dense(source, partial / BASE, read_config(source))
            _copy_matching(folder / BASE, partial / BASE, TOKENIZER)
        atomic_write_text(partial / FACTS, json.dumps(facts, indent=2) + "\n")
        atomic_write_text(partial / "README.md", card(family, member, facts, licence_of(folder / BASE)))
        if facts["attention"] is None:  # the script runs transformers, which has no other attention
            script = resources.files("heliostat") / "assets" / "reproduce.py"
            atomic_write_text(partial / "reproduce.py", script.read_text(encoding="utf-8"))
    return out


def _halves(family: Family, member: str) -> tuple[Module, Module]:
    """The member's own module, and the one that plays the rest (the base, where nothing is left)."""
    names = family.member(member).row.modules
    frozen = [name for name in names if name == BASE or family.module(name).quantization is not None]
    own = [name for name in names if name not in frozen]
    if len(own) != 1 or len(frozen) > 1:
        raise Refused(
            f"{member!r} is made of {', '.join(names)}: only one own module, and one other beside it, can be exported"
        )
    rides_on = family.module(own[0]).base
    return family.module(own[0]), family.module(frozen[0] if frozen else rides_on or BASE)


def _write_weights(folder: Path, source: Path, target: Path) -> None:
    """The module's files as others read them: tuned columns go out as the LoRA that they are."""
    if not is_adapter(source) or not is_columns(source):
        return _copy_weights(source, target)
    linears = read_config(folder / BASE).linears
    inputs = {path: linears[path.rsplit(".", 1)[-1]][0] for path in read_adapter(source)}
    return columns_as_lora(source, target, inputs)


def _copy_weights(source: Path, target: Path) -> None:
    if is_adapter(source):
        files = [source / CONFIG, adapter_file(source)]
    else:
        index = [source / INDEX] if (source / INDEX).exists() else []
        files = [source / "config.json", *weight_files(source), *index]
    for file in files:
        shutil.copy2(file, target / file.name)


def _copy_matching(source: Path, target: Path, starts: tuple[str, ...]) -> None:
    for file in sorted(
        p for p in source.iterdir() if p.is_file() and p.name.lower().startswith(starts or ("\0",))
    ):
        shutil.copy2(file, target / file.name)


def _facts(folder: Path, family: Family, member: str, own: str, other: Module) -> dict[str, Any]:
    row, entry = family.member(member).row, family.member(member)
    tokenizer = load_tokenizer(folder, family)
    roles = {part: "own" if getattr(row, part) == own else "base" for part in row.__dataclass_fields__}
    attention = read_config(folder / BASE).attention
    return {
        "format_version": 1,
        "member": member,
        "sharing": entry.sharing,
        "alone": row.alone and family.module(own).base is None,
        "row": roles,
        "attention": None if attention.plain else attention.to_json(),
        "digests": {
            roles_name: family.module(name).digest
            for roles_name, name in (("own", own), ("base", other.name))
        },
        "prompt_prefix": list(tokenizer.prefix),
        "eos_ids": list(tokenizer.eos_ids),
        **({"dequantized": other.quantization} if other.quantization is not None else {}),
        "recipe": dict(entry.recipe),
        "evaluation": dict(entry.evaluation),
    }


def import_member(folder: Path, member: str, source: Path) -> Member:
    """Take a fine-tune or a LoRA of the base into the family, served unchanged as ``independent``.

    A member that heliostat exported comes back in its own row. Raises Refused where the shape, the tokenizer, the
    format, or the base of an exported member is not the family's.
    """
    folder, source = Path(folder), Path(source)
    family = read_family(folder)
    family.free_name(member, folder=folder)
    if not source.is_dir():
        raise Refused(f"{source} is no folder; --from takes a checkpoint or a PEFT adapter on this disk")
    if (source / QUANTIZATION).exists():
        raise Refused(
            f"{source} lies in codebooks: bring in the weights that it was made of, and heliostat quantize them"
        )
    adapter = is_adapter(source)
    if not adapter:
        _refuse_other_shape(folder, source)
    _refuse_other_tokenizer(folder, family, source)
    sharing, parts = _row_of(source, family)
    with changing(folder):
        family = read_family(folder)
        family.free_name(member, folder=folder)
        own = own_module_name(member, family.modules)
        path = new_module_folder(folder, family, own)
        with atomic_directory(folder / path) as partial:
            _copy_weights(source, partial)
        try:
            module = describe_module(folder, own, path, base=BASE if adapter else None, family=family)
            grown = family.with_module(module)
            refuse_broken(folder, module)
            _try(folder, grown, own)
        except BaseException as error:
            shutil.rmtree(folder / path, ignore_errors=True)
            if isinstance(error, Refused):  # the copy is gone: it is the source that must be mended
                raise Refused(str(error).replace(str(folder / path), str(source))) from error
            raise
        row = Row(**{part: own if who == "own" else BASE for part, who in parts.items()})
        digests = {name: grown.module(name).digest for name in row.modules}
        entry = Member(member, row, sharing, digests, {"imported_from": source.name})
        write_family(folder, grown.with_member(entry))
    return entry


def import_draft(folder: Path, name: str, source: Path) -> Module:
    """Take a whole checkpoint of any shape into the family as a module that drafts for its speakers; no member is made.

    Raises Refused where the tokenizer or the format is not the family's, or the name is taken.
    """
    folder, source = Path(folder), Path(source)
    read_family(folder).free_module_name(name)
    if not source.is_dir():
        raise Refused(f"{source} is no folder; --from takes a checkpoint on this disk")
    if (source / QUANTIZATION).exists() or is_adapter(source):
        raise Refused(
            f"{source} is no whole model with plain weights: a draft runs alone, with pages of its own"
        )
    _refuse_other_tokenizer(folder, read_family(folder), source)
    known, needed = read_config(source).vocabulary, load_tokenizer(folder, read_family(folder)).size
    if known < needed:
        raise Refused(
            f"{source} knows {known} tokens, the family's tokenizer has {needed}: a draft needs them all"
        )
    with changing(folder):
        family = read_family(folder)
        path = new_module_folder(folder, family, family.free_module_name(name))
        with atomic_directory(folder / path) as partial:
            _copy_weights(source, partial)
        try:
            module = describe_module(folder, name, path, base=None, family=family)
            refuse_broken(folder, module)
            _try(folder, family.with_module(module), name)
        except BaseException:
            shutil.rmtree(folder / path, ignore_errors=True)
            raise
        write_family(folder, family.with_module(module))
    return module


def _row_of(source: Path, family: Family) -> tuple[str, dict[str, str]]:
    """(sharing, who plays each part: own or base) of what is imported: ``independent`` but for exported members."""
    if not (source / FACTS).is_file():
        return "independent", dict.fromkeys(PARTS, "own")
    facts, ours = read_json(source / FACTS), family.module(BASE).digest
    try:
        base, alone, sharing = str(facts["digests"]["base"]), facts["alone"], str(facts["sharing"])
        row = {part: str(facts["row"][part]) for part in PARTS}
    except (KeyError, TypeError) as error:
        raise Refused(
            f"{source / FACTS} is damaged: {error}; without it the rest is a plain model"
        ) from error
    if not alone and base != ours:
        raise Refused(
            f"{source} was tuned with a base of digest {base[:12]}; this family's base is {ours[:12]}"
        )
    return sharing, row


def _refuse_other_shape(folder: Path, source: Path) -> None:
    """A checkpoint of another shape cannot join: its pages would mean something else."""
    ours, theirs = read_config(folder / BASE), read_config(source)
    for field in ours.__dataclass_fields__:
        if field != "max_length" and getattr(ours, field) != getattr(theirs, field):
            raise Refused(
                f"{source}: {field} is {getattr(theirs, field)!r}, the family's base has {getattr(ours, field)!r}"
            )
    if theirs.max_length < ours.max_length:
        raise Refused(
            f"{source} runs {theirs.max_length} tokens exactly, the family's base {ours.max_length}"
        )


def _refuse_other_tokenizer(folder: Path, family: Family, source: Path) -> None:
    """Nor can one with another tokenizer, where it brings one: its ids would mean something else."""
    if not (source / "tokenizer.json").is_file():
        return
    tokenizer, own = Tokenizer.load(source), load_tokenizer(folder, family)
    if tokenizer.digest == own.digest:
        return
    other = [part for part in own.parts if tokenizer.parts[part] != own.parts[part]]
    names = sorted(p.name for p in source.iterdir() if p.name.startswith(TOKENIZER))
    raise Refused(
        f"{source} has another tokenizer than the family; what differs: {', '.join(other)} (digests "
        f"{tokenizer.digest[:12]} and {own.digest[:12]}). If the model was not tuned for it, remove the files of "
        f"the tokenizer there ({', '.join(names)}): without them the family's is taken"
    )


def _try(folder: Path, family: Family, own: str) -> Loaded:
    """Load it once, so that a missing tensor or a path that does not fit is refused now and not when it is served."""
    import torch

    return load_modules(folder, family, [own], dtype=torch.float32, verify=False)[own]


def remove_member(folder: Path, member: str) -> list[str]:
    """Take a member, the modules that were only its own and its run out of the family.

    Returns the removed modules' folders. Raises Refused where a run of that name is at work or unfinished.
    """
    folder = Path(folder)
    with changing(folder):
        family = read_family(folder)
        gone = [family.module(name).path for name in family.own_modules(member)]
        with _ended_run(folder, member) as run:
            # First the table, then the files: never the other way round.
            write_family(folder, family.without_member(member))
            shutil.rmtree(run, ignore_errors=True)
    for path in gone:
        shutil.rmtree(folder / path, ignore_errors=True)
    return gone


def rename_member(folder: Path, old: str, new: str) -> None:
    """Give a member another name; its run goes along, its modules keep theirs.

    Raises Refused where a run of either name is at work or unfinished.
    """
    folder = Path(folder)
    with changing(folder):
        family = read_family(folder).with_member_renamed(old, new, folder=folder)
        with _ended_run(folder, old) as run, _ended_run(folder, new) as place:
            write_family(folder, family)
            if run.exists():
                shutil.rmtree(place, ignore_errors=True)  # of a run that was refused or a member long gone
                run.rename(place)


@contextmanager
def _ended_run(folder: Path, member: str) -> Iterator[Path]:
    """The folder of a member's run, if there is one, held against training; Refused where the run is not over."""
    path = folder / RUNS / member
    if not path.is_dir():
        yield path
        return
    with locked(path / "run.lock", wait=False):
        if checkpoints(path):
            raise Refused(f"{path} holds an unfinished run of {member!r}; remove that folder to give it up")
        yield path
