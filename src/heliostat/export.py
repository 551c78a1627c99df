"""Members out of a family and models into it: Hugging Face folders and PEFT adapters, with a card that tells the truth."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
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
from heliostat.errors import Refused
from heliostat.family import PARTS, SHARINGS, Family, Member, Row, own_module_name
from heliostat.files import atomic_directory, atomic_write_text, locked, read_json
from heliostat.linear.adapter import (
    CONFIG,
    adapter_file,
    columns_as_lora,
    is_adapter,
    is_columns,
    read_adapter,
)
from heliostat.model.attention_kind import IN_WORDS, PREFIX
from heliostat.model.config import read_config
from heliostat.model.tokenizer import Tokenizer
from heliostat.model.weights import INDEX, weight_files
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


def export_member(folder: Path, member: str, out: Path) -> Path:
    """Write the member's own half to ``out``: weights or adapter, tokenizer, card, licence, row, reproducing script.

    Raises Refused where ``out`` exists, where the row has more than one module of its own, or where files changed.
    """
    folder, out = Path(folder), Path(out)
    family = read_family(folder)
    row = family.member(member).row
    others = [name for name in row.modules if name != BASE]
    if len(others) != 1:
        raise Refused(
            f"{member!r} is made of {', '.join(row.modules)}: only a base and one own module can be exported"
        )
    if out.exists():
        raise Refused(f"{out} is already there; choose another folder, or remove it first")
    for name in row.modules:
        verify_module(folder, family, name)
    own = family.module(others[0])
    facts = _facts(folder, family, member, own.name)
    with atomic_directory(out) as partial:
        _write_weights(folder, module_folder(folder, own), partial)
        _copy_matching(folder / BASE, partial, TOKENIZER if own.base is None else ())
        _copy_matching(folder / BASE, partial, LICENCES)
        atomic_write_text(partial / FACTS, json.dumps(facts, indent=2) + "\n")
        atomic_write_text(partial / "README.md", card(family, member, facts, _licence(folder / BASE)))
        if facts["attention"] is None:  # the script runs transformers, which has no other attention
            script = resources.files("heliostat") / "assets" / "reproduce.py"
            atomic_write_text(partial / "reproduce.py", script.read_text(encoding="utf-8"))
    return out


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


def _facts(folder: Path, family: Family, member: str, own: str) -> dict[str, Any]:
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
            roles_name: family.module(name).digest for roles_name, name in (("own", own), ("base", BASE))
        },
        "prompt_prefix": list(tokenizer.prefix),
        "eos_ids": list(tokenizer.eos_ids),
        "recipe": dict(entry.recipe),
        "evaluation": dict(entry.evaluation),
    }


def _licence(base: Path) -> str | None:
    """The licence that the base's card declares, if it has one."""
    readme = base / "README.md"
    if not readme.is_file():
        return None
    found = re.search(
        r"^license:\s*(\S+)\s*$", readme.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
    )
    return found[1] if found else None


def card(family: Family, member: str, facts: Mapping[str, Any], licence: str | None) -> str:
    """The model card (README.md) of an exported member."""
    row, sharing = facts["row"], family.member(member).sharing
    head = [
        "---",
        f"library_name: {'transformers' if facts.get('attention') is None else 'heliostat'}",
        *([f"license: {licence}"] if licence else []),
        "tags: [heliostat]",
        "---",
    ]
    shared = SHARINGS[sharing].shared if sharing in SHARINGS else "as its row says"
    table = "\n".join(
        f"| {part} | {'this folder' if who == 'own' else 'the base'} |" for part, who in row.items()
    )
    evaluation = (
        "\n".join(f"- {name}: {value}" for name, value in facts["evaluation"].items()) or "- none recorded"
    )
    licence_line = (
        f"The base's licence ({licence}) applies."
        if licence
        else "The base's licence applies; its files lie beside this card where it has any."
    )
    return "\n".join(
        [
            *head,
            f"# {member}",
            "",
            f"A member of a heliostat family, sharing `{sharing}` (shared when serving: {shared}). {_standing(facts)}",
            "",
            "| part | played by |",
            "|---|---|",
            table,
            "",
            *_base_line(facts),
            "## Run it",
            "",
            f'With heliostat: `heliostat generate FAMILY --member {member} --dtype float32 --prompt "..."`.',
            "",
            _without_heliostat(facts),
            "",
            *_same_answers(facts),
            "## Evaluation",
            "",
            evaluation,
            "",
            "## Licence",
            "",
            licence_line,
            "",
        ]
    )


def _same_answers(facts: Mapping[str, Any]) -> list[str]:
    """When the script's answers are heliostat's, where there is a script."""
    if facts.get("attention") is not None:
        return []
    return [
        "Greedy answers are the same in the same number format; left out, heliostat's `--dtype` is bfloat16 where",
        "the hardware multiplies it, the script's is float32.",
        "",
    ]


def _base_line(facts: Mapping[str, Any]) -> list[str]:
    """Which base it needs, where it needs one."""
    if facts["alone"]:
        return []
    digest = facts["digests"]["base"]
    return [
        f"Base: SHA-256 digest `{digest}` over tensors and configuration. Another base gives other answers.",
        "",
    ]


def _without_heliostat(facts: Mapping[str, Any]) -> str:
    """How to answer with transformers alone, where it can."""
    if (attention := facts.get("attention")) is not None:
        return (
            f"Only heliostat runs it: its attention is `{attention['kind']}`, which neither transformers nor vLLM has "
            f"({IN_WORDS[attention['kind']]}). Its `model_type` begins with `{PREFIX}`, so that both refuse it by name "
            "instead of answering as another model."
        )
    if facts["alone"]:
        return 'With transformers: `python reproduce.py --prompt "..."`, or `from_pretrained` this folder.'
    return 'With two models in transformers: `python reproduce.py --base PATH_OF_THE_BASE --prompt "..."`.'


def _standing(facts: Mapping[str, Any]) -> str:
    """Whether what is exported answers by itself."""
    if facts["alone"]:
        return "A whole model: it answers by itself."
    if row_is_own(facts["row"]):
        return "An adapter: it answers on the base's weights."
    return (
        "**Half a member.** Run alone, these weights do not answer as the member does: "
        "the base plays the other parts of its row."
    )


def row_is_own(row: Mapping[str, str]) -> bool:
    """Whether one's own module plays every part."""
    return set(row.values()) == {"own"}


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
