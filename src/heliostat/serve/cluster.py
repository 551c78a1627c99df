"""Which worker hosts which modules, with how many threads and how much memory: written down, or laid out from rows.

No torch and no processes: what is started from it, and how, ``supervisor`` knows.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

import yaml

from heliostat.errors import Refused
from heliostat.family import NAME, Family, Row, choose
from heliostat.files import read_yaml
from heliostat.serve.protocol import Role

PREFILL: Role = "prefill"
DECODE: Role = "decode"
ROLES: tuple[Role, ...] = get_args(Role)
EMBEDDED, VLLM = ENGINES = ("embedded", "vllm")
"""The engines that are started here; one that runs at a url is of the second kind."""
EXAMPLE = "lines like `workers: [{spawn: embedded, roles: [prefill]}, {spawn: embedded, roles: [decode]}]`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One worker of a cluster."""

    name: str
    spawn: str | None = EMBEDDED
    """The kind of engine that is started for it; None where it runs already, at ``url``."""
    url: str | None = None
    modules: tuple[str, ...] | None = None
    """By the family's names; None: what the rows of the members ask of its roles."""
    roles: tuple[Role, ...] = ROLES
    threads: int | None = None
    """None: an equal share of the cores."""
    memory: int | None = None
    """MiB for weights, pages and workspace together; None: weights and workspace, and --cache-mib for pages."""
    tensor_parallel: int = 1
    """Devices that one server of the second engine is spread over."""

    @property
    def engine(self) -> str:
        """Its kind."""
        return VLLM if self.url is not None else str(self.spawn)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What all servers of the second engine have in common, and must say of themselves."""

    page_size: int = 32
    """Positions."""
    dtype: str | None = None
    """Number format; None: bfloat16."""
    transfer: str = "files"
    """How keys and values travel: ``files`` (one machine), ``nixl``, or another connector's name."""
    max_length: int | None = None
    """Most tokens of a request; None: what the base allows."""
    key_env: str | None = None
    """Name of the environment variable that holds the servers' key."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Workers by their places. Raises Refused for names that are not one worker's alone."""

    places: tuple[Place, ...]
    family: str | None = None
    """Folder, as it is written in the file."""
    terms: Terms = Terms()

    def __post_init__(self) -> None:
        names = [place.name for place in self.places]
        if not names:
            raise Refused(f"a cluster needs workers: {EXAMPLE}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise Refused(f"two workers are called {twice[0]!r}: give each a name of its own, or none")

    def of_role(self, role: Role) -> tuple[Place, ...]:
        """Workers that do this."""
        return tuple(place for place in self.places if role in place.roles)

    def hosts(self, row: Row) -> dict[str, tuple[str, ...]]:
        """Worker -> modules of a row that it should host, by the family's names.

        Who prefills hosts the prompt_writer, who decodes the answer_writer and the speaker. Where the file names
        workers for a module, it goes to those; else to all of the role.
        """
        found: dict[str, dict[str, None]] = {}
        readers = self.of_role(PREFILL) or self.of_role(DECODE)
        for module, places in (
            (row.prompt_writer, readers),
            (row.answer_writer, self.of_role(DECODE)),
            (row.speaker, self.of_role(DECODE)),
        ):
            named = [place for place in places if place.modules and module in place.modules]
            for place in named or [place for place in places if place.modules is None] or places:
                found.setdefault(place.name, {})[module] = None
        return {name: tuple(modules) for name, modules in found.items()}

    def filled(self, rows: Mapping[str, Row]) -> Cluster:
        """The same with every worker's modules: those of the file, or what these members ask of its roles."""
        asked: dict[str, dict[str, None]] = {}
        for row in rows.values():
            for name, modules in self.hosts(row).items():
                asked.setdefault(name, {}).update(dict.fromkeys(modules))
        places = (
            p if p.modules is not None else replace(p, modules=tuple(asked.get(p.name, ())))
            for p in self.places
        )
        return Cluster(tuple(places), self.family, self.terms)

    @property
    def engine(self) -> str:
        """The kind of all its workers."""
        return self.places[0].engine

    def refuse_unreachable(self) -> None:
        """Raise Refused for the first worker whose engine this version cannot start or reach, or that is of another
        kind than the others."""
        for place in self.places:
            if place.engine not in ENGINES:
                near = _near(place.engine, ENGINES)
                raise Refused(
                    f"worker {place.name!r}: no engine {place.spawn!r}{near}; this version starts: {', '.join(ENGINES)}"
                )
            if place.url is not None and not place.url.startswith(("http://", "https://")):
                raise Refused(
                    f"worker {place.name!r}: url is {place.url!r}; it must be like http://10.0.0.2:8001"
                )
            if place.engine != self.engine:
                raise Refused(
                    f"worker {place.name!r} is of engine {place.engine}, worker {self.places[0].name!r} of {self.engine}: "
                    "their pages mean nothing to each other; one cluster has one kind"
                )
            if place.tensor_parallel != self.places[0].tensor_parallel:
                raise Refused(
                    f"worker {place.name!r} has tensor_parallel {place.tensor_parallel}, worker {self.places[0].name!r} "
                    f"{self.places[0].tensor_parallel}: keys and values do not travel between the two; give all the same"
                )
            if place.engine == EMBEDDED and place.tensor_parallel > 1:
                raise Refused(
                    f"worker {place.name!r}: tensor_parallel is for {VLLM}; the embedded engine runs on one device"
                )

    def refuse_unplayable(self, family: Family, rows: Mapping[str, Row]) -> None:
        """Raise Refused for modules that there are not, and for a member that no set of these workers can play."""
        for place in self.places:
            for module in place.modules or ():
                family.module(module)
        for member, row in rows.items():
            if missing := self._missing(row):
                raise Refused(f"member {member!r} cannot be played by this cluster: {missing}")

    def _missing(self, row: Row) -> str:
        speakers = {row.answer_writer, row.speaker}
        answering = [p for p in self.of_role(DECODE) if speakers <= set(p.modules or ())]
        if not answering:
            names = " and ".join(repr(name) for name in sorted(speakers))
            both = "both of " if len(speakers) > 1 else ""
            return f"no worker with role decode hosts {both}{names}"
        reading = [p for p in self.of_role(PREFILL) if row.prompt_writer in (p.modules or ())]
        if not reading and not any(row.prompt_writer in (p.modules or ()) for p in answering):
            return f"no worker with role prefill hosts {row.prompt_writer!r}, which reads its prompts"
        return ""

    def to_yaml(self) -> str:
        """A file that ``read`` reads back."""
        shown = [
            {key: value for key, value in _shown(place).items() if value is not None} for place in self.places
        ]
        content: dict[str, Any] = {"family": self.family} if self.family else {}
        if self.terms != Terms():
            content["vllm"] = {key: value for key, value in asdict(self.terms).items() if value is not None}
        content["workers"] = shown
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def laid_out(
    *,
    prefill: int,
    decode: int,
    family: str | None = None,
    engine: str = EMBEDDED,
    terms: Terms | None = None,
) -> Cluster:
    """So many workers that prefill and so many that decode, on this machine."""
    if prefill < 1 or decode < 1:
        raise Refused(
            f"--prefill-workers {prefill} and --decode-workers {decode}: give both, each at least 1 (neither: one "
            "process does all)"
        )
    places = [Place(name=f"prefill-{n}", spawn=engine, roles=(PREFILL,)) for n in range(prefill)]
    places += [Place(name=f"decode-{n}", spawn=engine, roles=(DECODE,)) for n in range(decode)]
    return Cluster(tuple(places), family, terms or Terms())


def read(path: Path) -> Cluster:
    """The cluster of a YAML file; what is wrong with it is refused with the place and the nearest name."""
    content = read_yaml(path, what=f"cluster file: it should hold {EXAMPLE}")
    refuse_unknown(content, ("family", "vllm", "workers"), where=str(path))
    workers, family = content.get("workers"), content.get("family")
    if not isinstance(workers, list):
        raise Refused(f"{path}: workers is {workers!r}; it must be a list of workers")
    if family is not None and not isinstance(family, str):
        raise Refused(f"{path}: family is {family!r}; it must be a folder")
    places, counts = [], dict.fromkeys(("prefill", "decode", "worker"), 0)
    for number, values in enumerate(workers):
        place = _place(values, where=f"{path}: workers[{number}]", counts=counts)
        places.append(place)
    return Cluster(tuple(places), family, terms_of(content.get("vllm", {}), where=f"{path}: vllm"))


def terms_of(values: Any, *, where: str) -> Terms:
    """What all servers have in common; Refused, with the place, for what is wrong."""
    if not isinstance(values, dict):
        raise Refused(f"{where} is {values!r}; it must hold lines like `page_size: 32`")
    refuse_unknown(values, [field.name for field in fields(Terms)], where=where)
    for word in ("dtype", "transfer", "key_env"):
        if not isinstance(values.get(word, ""), str):
            raise Refused(f"{where}: {word} is {values[word]!r}; it must be a text")
    for word in ("page_size", "max_length"):
        counted(values.get(word), f"{where}: {word}")
    return Terms(**values)


def _place(values: Any, *, where: str, counts: dict[str, int]) -> Place:
    if not isinstance(values, dict):
        raise Refused(f"{where} is {values!r}; it must hold lines like `roles: [decode]`")
    refuse_unknown(
        values,
        ("name", "spawn", "url", "modules", "roles", "threads", "memory", "tensor_parallel"),
        where=where,
    )
    roles = tuple(words(values.get("roles", list(ROLES)), f"{where}: roles"))
    if strange := [role for role in roles if role not in ROLES]:
        raise Refused(
            f"{where}: no role {strange[0]!r}{_near(strange[0], ROLES)}; allowed are {', '.join(ROLES)}"
        )
    if not roles:
        raise Refused(f"{where}: roles is empty; allowed are {', '.join(ROLES)}")
    kind = roles[0] if len(set(roles)) == 1 else "worker"
    name = values.get("name", f"{kind}-{counts[kind]}")
    counts[kind] += "name" not in values
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Refused(f"{where}: {name!r} is no name: letters, digits, '.', '_', '-', at most 64")
    modules = values.get("modules")
    spawn, url = _engine(values, where)
    return Place(
        name=name,
        spawn=spawn,
        url=url,
        modules=None if modules is None else tuple(dict.fromkeys(words(modules, f"{where}: modules"))),
        roles=tuple(role for role in ROLES if role in roles),
        threads=counted(values.get("threads"), f"{where}: threads"),
        memory=counted(values.get("memory"), f"{where}: memory (MiB)"),
        tensor_parallel=counted(values.get("tensor_parallel"), f"{where}: tensor_parallel") or 1,
    )


def _engine(values: Mapping[str, Any], where: str) -> tuple[str | None, str | None]:
    spawn, url = values.get("spawn"), values.get("url")
    if (spawn is None) == (url is None):
        raise Refused(
            f"{where}: give spawn: {EMBEDDED} or {VLLM} to start it here, or the url of a vLLM server; one of them"
        )
    for word, value in (("spawn", spawn), ("url", url)):
        if value is not None and not isinstance(value, str):
            raise Refused(f"{where}: {word} is {value!r}; it must be a text")
    return spawn, url


def words(value: Any, where: str) -> Sequence[str]:
    """A list of texts; Refused where it is none."""
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise Refused(f"{where} is {value!r}; it must be a list of names")
    return value


def counted(value: Any, where: str) -> int | None:
    """A number of at least 1, or None; Refused where it is something else."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Refused(f"{where} is {value!r}; it must be a number, at least 1")
    return value


def refuse_unknown(values: Mapping[Any, Any], known: Iterable[str], *, where: str) -> None:
    """Raise Refused, with the nearest known one, for the first key that is not known."""
    table = dict.fromkeys(known)
    for name in values:
        try:
            choose(str(name), table, what="key")
        except Refused as refused:
            raise Refused(f"{where}: {refused}") from None


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _shown(place: Place) -> dict[str, Any]:
    return {
        "name": place.name,
        "spawn": place.spawn,
        "url": place.url,
        "roles": list(place.roles),
        "modules": None if place.modules is None else list(place.modules),
        "threads": place.threads,
        "memory": place.memory,
        "tensor_parallel": place.tensor_parallel if place.tensor_parallel > 1 else None,
    }
