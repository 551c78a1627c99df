"""The centre of the house: a family is a table of members over named modules; all else is computed from it.

Knows no files, no tensors and no method: a new way of sharing is a new line in ``SHARINGS``.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath, PurePosixPath
from typing import Any, TypeVar

from heliostat.errors import Refused

FORMAT_VERSION = 1
T = TypeVar("T")
BASE = "base"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Row:
    """Which module plays each part for one member. All fields are module names.

    A *writer*'s keys and values land in the cache; a *speaker*'s logits choose the next token. Positions
    below the boundary are written by ``prompt_writer``; from the boundary on ``answer_writer`` writes and
    ``speaker`` speaks. ``first_speaker`` chooses the first answer token.
    """

    prompt_writer: str
    answer_writer: str
    speaker: str
    first_speaker: str

    def __post_init__(self) -> None:
        if self.first_speaker not in (self.prompt_writer, self.speaker):
            raise Refused(
                f"first_speaker {self.first_speaker!r} is neither the prompt_writer {self.prompt_writer!r} "
                f"nor the speaker {self.speaker!r}: nobody else has read the prompt"
            )

    def boundary(self, prompt_tokens: int) -> int:
        """First position that answer_writer writes: n if the prompt_writer speaks first, else n - 1."""
        return prompt_tokens if self.first_speaker == self.prompt_writer else prompt_tokens - 1

    def writer_at(self, position: int, prompt_tokens: int) -> str:
        """Module whose keys and values stand at ``position`` of a request with that many prompt tokens."""
        return self.prompt_writer if position < self.boundary(prompt_tokens) else self.answer_writer

    def speaker_at(self, position: int, prompt_tokens: int) -> str:
        """Module whose logits at ``position`` (>= the last prompt token) choose the token after it."""
        return self.prompt_writer if position < self.boundary(prompt_tokens) else self.speaker

    @property
    def two_rows(self) -> bool:
        """Whether an answer token needs one row for who writes and one for who speaks."""
        return self.answer_writer != self.speaker

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules this row needs, each once, in the order of its parts."""
        return tuple(
            dict.fromkeys((self.prompt_writer, self.answer_writer, self.speaker, self.first_speaker))
        )

    @property
    def alone(self) -> bool:
        """Whether one module plays every part, so that it is a whole model by itself."""
        return len(self.modules) == 1

    @property
    def answers_become_prompts(self) -> bool:
        """Whether an answer's pages can be reused when the answer returns as part of a prompt."""
        return self.answer_writer == self.prompt_writer


@dataclass(frozen=True, slots=True)
class Sharing:
    """A way of sharing: a row with ``own`` where the member's module goes, and what to tell a user about it."""

    row: Row
    shared: str
    choose_when: str
    price: str
    targets: str = "all"  # which Linears an adapter of this sharing tunes: all, or those that write no K,V
    tuner: str = "full"  # how its members are tuned where nobody says otherwise

    @property
    def frozen(self) -> dict[str, tuple[str, ...]]:
        """Options of `heliostat train` that put another module in the base's place, and the parts each of them fills."""
        row, still = self.row, [part for part in PARTS if getattr(self.row, part) != "own"]
        if row.speaker != "own":  # who speaks is who writes the answer, where both are frozen
            return {"speaker": tuple(still)}
        return {"writer": tuple(still)} if still else {}

    def replaced(self, **options: str | None) -> dict[str, str]:
        """``instantiate``'s others for the options ``writer`` and ``speaker``. Refused where no such part is frozen."""
        others: dict[str, str] = {}
        for option, module in options.items():
            if module is None:
                continue
            if option not in self.frozen:
                there = ", ".join(f"--{name}" for name in self.frozen) or "neither --speaker nor --writer"
                raise Refused(
                    f"{option} {module!r}: this sharing has no frozen {option} to replace; it takes {there}"
                )
            others |= dict.fromkeys(self.frozen[option], module)
        return others

    def instantiate(self, own: str, others: Mapping[str, str] | None = None) -> Row:
        """Row with ``own`` replaced by a module name; ``others`` renames frozen parts (``speaker`` -> ``base-2bit``)."""
        frozen = dict(others or {})
        parts = {part: getattr(self.row, part) for part in PARTS}
        unknown = sorted(set(frozen) - {part for part, module in parts.items() if module != "own"})
        if unknown:
            raise Refused(
                f"{', '.join(unknown)}: not a frozen part of this sharing, so it cannot be replaced"
            )
        if "speaker" in frozen and parts["answer_writer"] == parts["speaker"]:
            frozen.setdefault("answer_writer", frozen["speaker"])
        return Row(
            **{part: own if module == "own" else frozen.get(part, module) for part, module in parts.items()}
        )


PARTS = ("prompt_writer", "answer_writer", "speaker", "first_speaker")

SHARINGS: dict[str, Sharing] = {
    "independent": Sharing(
        Row("own", "own", "own", "own"),
        shared="nothing",
        choose_when="nothing is shared in your load, or you serve a model as it is",
        price="N models' memory, N decode batches, N copies of every prompt's KV",
    ),
    "sun": Sharing(
        Row("own", "base", "base", "own"),
        shared="decode: one batch over all members",
        choose_when="decode load is skewed over members",
        price="prompts are prefilled per member; the answers of earlier turns are prefilled again",
    ),
    "prefillshare": Sharing(
        Row("base", "own", "own", "own"),
        shared="prefill: one copy of every prompt's KV",
        choose_when="several agents read one long context",
        price="N decode modules; the answers of earlier turns are prefilled again",
    ),
    "icarus": Sharing(
        Row("base", "base", "own", "own"),
        shared="all KV, prompt and answer",
        choose_when="agents continue each other's answers, memory is short",
        price="two rows for every answer token",
        targets="query_side",
        tuner="lora",
    ),
}


def sharing_named(name: str) -> Sharing:
    """The sharing of that name; a misspelled one is refused with the nearest name."""
    return choose(name, SHARINGS, what="sharing")


def choose(name: str, table: Mapping[str, T], *, what: str) -> T:
    """``table[name]``, or a refusal that names the allowed keys and the nearest one."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise Refused(f"no {what} {name!r}{hint}; there is: {', '.join(sorted(table)) or 'none yet'}")


@dataclass(frozen=True, slots=True)
class Module:
    """Weights of a whole transformer: an ordinary checkpoint, or an adapter on the weights of another module."""

    name: str
    path: str
    """Folder, relative to the family's."""
    digest: str
    """SHA-256 over tensors, adapter scaling, quantization and architecture options (hex)."""
    base: str | None = None
    """For an adapter, the module whose weights it rides on; None for a checkpoint of its own."""
    quantization: str | None = None
    """For Linears in codebooks their format (``m1v4g128``); None where they are plain."""
    parameters: int = 0
    """Parameters that are this module's own (an adapter counts only itself)."""

    def __post_init__(self) -> None:
        # `member rm` removes this folder, whoever wrote family.json.
        parts = PurePosixPath(self.path).parts
        if not parts or ".." in parts or self.path.startswith("/"):
            raise Refused(f"module {self.name!r} lies in {self.path!r}, which is no folder inside the family")

    @property
    def weights(self) -> str:
        """Name of the module whose weights run the pass; modules with the same weights share a pass."""
        return self.base or self.name


@dataclass(frozen=True, slots=True)
class Member:
    """One specialist: a row, and where it came from."""

    name: str
    row: Row
    sharing: str
    """The line of ``SHARINGS`` it was made from; for people to read, nothing is decided by it."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Digest of each module of the row when the member was tuned: another one is another member."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Family:
    """Modules by name, members by name, one tokenizer. Immutable: every change is a new family."""

    modules: Mapping[str, Module]
    members: Mapping[str, Member] = field(default_factory=dict)
    tokenizer: str = ""

    def __post_init__(self) -> None:
        for module in self.modules.values():
            if module.base is not None and self.module(module.base).base is not None:
                raise Refused(f"module {module.name!r} is an adapter on the adapter {module.base!r}")
        for member in self.members.values():
            for name in member.row.modules:
                self.module(name)

    def module(self, name: str) -> Module:
        return choose(name, self.modules, what="module")

    def member(self, name: str) -> Member:
        return choose(name, self.members, what="member")

    def row(self, name: str) -> Row:
        """The row of a member; a module's name stands for that module alone, playing every part."""
        if name in self.modules and name not in self.members:
            return Row(name, name, name, name)
        return self.member(name).row

    def own_modules(self, member: str) -> tuple[str, ...]:
        """Modules that only this member uses: what its row trains, and what goes when it is removed.

        What was quantized is nobody's own: it stays until it is removed itself.
        """
        others = {name for m in self.members.values() if m.name != member for name in m.row.modules}
        kept = {BASE, *others, *(self.module(name).weights for name in others)}
        kept |= {name for name, module in self.modules.items() if module.quantization is not None}
        return tuple(name for name in self.member(member).row.modules if name not in kept)

    def partners(self, member: str) -> dict[str, tuple[str, ...]]:
        """For each part of the row, the other members whose same part runs on the same weights."""
        row, found = self.member(member).row, {}
        for part in PARTS[:3]:
            weights = self.module(getattr(row, part)).weights
            found[part] = tuple(
                m.name
                for m in self.members.values()
                if m.name != member and self.module(getattr(m.row, part)).weights == weights
            )
        return found

    def users(self, module: str) -> tuple[str, ...]:
        """Members whose rows name a module, or an adapter on it."""
        return tuple(
            m.name
            for m in self.members.values()
            if any(module in (name, self.module(name).weights) for name in m.row.modules)
        )

    def with_module(self, module: Module) -> Family:
        return Family({**self.modules, module.name: module}, self.members, self.tokenizer)

    def with_member(self, member: Member) -> Family:
        return Family(self.modules, {**self.members, member.name: member}, self.tokenizer)

    def without_member(self, name: str) -> Family:
        """The family without a member and without the modules that were only its own."""
        gone = set(self.own_modules(name))
        modules = {n: m for n, m in self.modules.items() if n not in gone}
        return Family(modules, {n: m for n, m in self.members.items() if n != name}, self.tokenizer)

    def with_member_renamed(self, old: str, new: str, *, folder: str | PurePath) -> Family:
        """The same family under a new member name; module names and folders stay. ``folder``: for the advice."""
        member, new = self.member(old), self.free_name(new, folder=folder)
        renamed = {
            new if n == old else n: replace(member, name=new) if n == old else m
            for n, m in self.members.items()
        }
        return Family(self.modules, renamed, self.tokenizer)

    def free_name(self, name: str, *, folder: str | PurePath) -> str:
        """``name`` if a new member may have it; refused if malformed or taken.

        ``folder`` is the family's, so that the command in the refusal can be pasted.
        """
        if not NAME.fullmatch(name):
            raise Refused(
                f"{name!r} is no member name: letters, digits, '.', '_', '-', at most 64, not starting with a sign"
            )
        if name in self.members:
            raise Refused(
                f"there is already a member {name!r}: choose another name, or first "
                + shlex.join(["heliostat", "member", "rm", str(folder), name])
            )
        if name in self.modules:
            raise Refused(f"{name!r} is the name of a module of this family: choose another member name")
        return name

    def free_module_name(self, name: str) -> str:
        """``name`` if a new module may have it; refused if malformed or taken."""
        if not NAME.fullmatch(name):
            raise Refused(
                f"{name!r} is no module name: letters, digits, '.', '_', '-', at most 64, not starting with a sign"
            )
        if name in self.modules:
            raise Refused(f"there is already a module {name!r}: choose another name")
        if name in self.members:
            raise Refused(f"{name!r} is the name of a member of this family: choose another module name")
        return name

    def without_module(self, name: str) -> Family:
        """The family without a module that nobody uses; refused where it is the base, a member's own or used."""
        module, users = self.module(name), self.users(name)
        if name == BASE:
            raise Refused(f"{name!r} is what the family stands on: it cannot be removed")
        if module.quantization is None and users:
            raise Refused(
                f"{name!r} is not a quantized module: it goes with its member (heliostat member rm)"
            )
        if users or any(other.base == name for other in self.modules.values()):
            raise Refused(f"module {name!r} is used by {', '.join(users) or 'an adapter'}: remove them first")
        return Family({n: m for n, m in self.modules.items() if n != name}, self.members, self.tokenizer)

    def to_json(self) -> dict[str, Any]:
        """What family.json holds."""
        return {
            "format_version": FORMAT_VERSION,
            "tokenizer": self.tokenizer,
            "modules": {m.name: _without(asdict(m), "name") for m in self.modules.values()},
            "members": {m.name: _without(asdict(m), "name") for m in self.members.values()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Family:
        """The family that family.json describes; unknown versions and missing fields are refused by name."""
        version = data.get("format_version")
        if version != FORMAT_VERSION:
            raise Refused(
                f"family.json has format_version {version!r}; this heliostat reads {FORMAT_VERSION}"
            )
        try:
            modules = {n: Module(name=n, **m) for n, m in data["modules"].items()}
            members = {n: Member(name=n, **{**m, "row": Row(**m["row"])}) for n, m in data["members"].items()}
            return cls(modules, members, data["tokenizer"])
        except (KeyError, TypeError, AttributeError) as error:
            raise Refused(f"family.json is not a heliostat family: {error}") from error


def own_module_name(member: str, taken: Iterable[str]) -> str:
    """A free module name for a member's own module: ``math.own``, or ``math.own-2`` where that is taken."""
    names, number = set(taken), 1
    while (name := f"{member}.own" if number == 1 else f"{member}.own-{number}") in names:
        number += 1
    return name


def _without(facts: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in facts.items() if k != key}
