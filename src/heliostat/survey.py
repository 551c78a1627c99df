"""What a family is made of and what it saves: modules, members, who shares what, memory. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heliostat.family import BASE, Family, Member, Module, Row
from heliostat.files import read_json
from heliostat.model.config import ModelConfig, read_config
from heliostat.ops.codebook_format import Format

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
CONTEXT = 1024
"""Tokens of the prompt whose keys and values are counted, or the model's longest text if that is shorter."""


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """One module: bytes are what its own parameters take in memory, in the base's number format or in codebooks."""

    name: str
    kind: str
    parameters: int
    bytes: int
    digest: str
    users: tuple[str, ...]
    """Members that run it, or an adapter on it."""
    quantization: str | None = None
    """Format of its Linears, where they lie in codebooks."""
    bits: float | None = None
    """Of a number in them, codebooks and scales included."""


@dataclass(frozen=True, slots=True)
class MemberFacts:
    """One member and its company, by names of other members."""

    name: str
    sharing: str
    row: Row
    one_pass: Mapping[str, tuple[str, ...]]
    """By part of the row: who runs it on the same weights, so that one pass serves both."""
    one_prompt: tuple[str, ...]
    """Who reads the same prompt out of the same keys and values."""
    one_cache: tuple[str, ...]
    """Who goes on after this member's answers out of the keys and values they left, and the reverse."""
    evaluation: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Saving:
    """Bytes of one kind: as many separate models as there are members, and the family."""

    what: str
    separate: int
    family: int
    why: str


@dataclass(frozen=True, slots=True)
class Survey:
    """All that ``heliostat inspect`` shows."""

    folder: str
    dtype: str
    modules: tuple[ModuleFacts, ...]
    members: tuple[MemberFacts, ...]
    savings: tuple[Saving, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, in plain values."""
        return asdict(self)


def survey(folder: str | Path, family: Family) -> Survey:
    """Look at a family that lies in ``folder``; sizes are parameters times bytes."""
    base = Path(folder) / family.module(BASE).path
    config, facts = read_config(base), read_json(base / "config.json")
    dtype = str(facts.get("dtype") or facts.get("torch_dtype") or "float32")
    size = BYTES.get(dtype, 4)
    tokens = min(CONTEXT, config.max_length)
    taken = {name: bytes_of(module, config, size) for name, module in family.modules.items()}
    prompt = 2 * config.layers * config.kv_heads * config.head_width * size * tokens
    return Survey(
        str(folder),
        dtype,
        tuple(_module(family, name, taken[name], config) for name in family.modules),
        tuple(_member(family, member) for member in family.members.values()),
        savings(family, size=size, prompt=prompt, tokens=tokens, taken=taken) if family.members else (),
    )


def bytes_of(module: Module, config: ModelConfig, size: int) -> int:
    """That a module's own parameters take in memory; ``size``: bytes of a plain one."""
    if module.quantization is None:
        return module.parameters * size
    sides, format = list(config.linears.values()) * config.layers, Format.parse(module.quantization)
    plain = module.parameters - sum(inputs * outputs for inputs, outputs in sides)
    return plain * size + sum(format.bytes(outputs, inputs) for inputs, outputs in sides)


def savings(
    family: Family, *, size: int, prompt: int, tokens: int, taken: Mapping[str, int] | None = None
) -> tuple[Saving, ...]:
    """What the members take; ``size``: bytes a parameter; ``prompt``: K,V bytes of a prompt of ``tokens``.

    ``taken``: bytes of each module, where they are not its parameters times ``size``.
    """
    if taken is None:
        taken = {name: module.parameters * size for name, module in family.modules.items()}
    sizes = taken
    rows = [member.row for member in family.members.values()]
    one = family.module(BASE).parameters * size

    def weights(what: str, names: Iterable[str]) -> Saving:
        needed = _resting_on(family, names)
        total = sum(sizes[name] for name in needed)
        return Saving(
            what, len(rows) * one, total, f"{len(needed)} modules" if len(needed) != 1 else "1 module"
        )

    writers = {row.prompt_writer for row in rows}
    copies = Saving(
        f"K,V of one prompt of {tokens:,} tokens, read by all",
        len(rows) * prompt,
        len(writers) * prompt,
        "1 copy" if len(writers) == 1 else f"{len(writers)} copies",
    )
    return (
        weights("all weights", [name for row in rows for name in row.modules]),
        weights("weights that read prompts", writers),
        weights(
            "weights that write answers", [name for row in rows for name in (row.answer_writer, row.speaker)]
        ),
        copies,
    )


def _resting_on(family: Family, names: Iterable[str]) -> set[str]:
    """These modules, and the weights that the adapters among them ride on."""
    return {each for name in names for each in (name, family.module(name).weights)}


def _module(family: Family, name: str, taken: int, config: ModelConfig) -> ModuleFacts:
    module = family.module(name)
    kind, bits = "weights" if module.base is None else f"adapter on {module.base}", None
    if module.quantization is not None:
        format, sides = Format.parse(module.quantization), list(config.linears.values())
        bits = 8 * sum(format.bytes(b, a) for a, b in sides) / sum(a * b for a, b in sides)
        kind = f"{format}, {bits:.2f} bits"
    facts = (kind, module.parameters, taken, module.digest, family.users(name), module.quantization, bits)
    return ModuleFacts(name, *facts)


def _member(family: Family, member: Member) -> MemberFacts:
    others = [other for other in family.members.values() if other.name != member.name]
    row = member.row
    one_prompt = tuple(o.name for o in others if o.row.prompt_writer == row.prompt_writer)
    # An answer's pages hang on the prompt's: they are found again only where one module wrote both, for both.
    one_cache = tuple(
        o.name
        for o in others
        if o.name in one_prompt and row.answers_become_prompts and o.row.answers_become_prompts
    )
    return MemberFacts(
        member.name,
        member.sharing,
        row,
        family.partners(member.name),
        one_prompt,
        one_cache,
        member.evaluation,
    )
