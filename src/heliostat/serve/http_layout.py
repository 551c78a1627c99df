"""Which vLLM server holds which weights and adapters: one set of weights each, dealt out by rows. No torch.

A server is started with one checkpoint. Adapters on it either write and speak by themselves, or only speak beside the
weights that write (two streams): which of these, the rows that a place hosts decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from heliostat.errors import Refused
from heliostat.family import Family, Row
from heliostat.serve.cluster import DECODE, PREFILL, Cluster, Place
from heliostat.serve.protocol import Role

Group = tuple[str, bool]
"""(weights, two streams)."""


@dataclass(frozen=True, slots=True)
class Server:
    """What one place's server is started with, by the family's names."""

    place: Place
    weights: str
    adapters: tuple[str, ...]
    two_streams: bool

    @property
    def modules(self) -> tuple[str, ...]:
        """All that it holds."""
        return (self.weights, *self.adapters)


def groups_of(family: Family, rows: Mapping[str, Row], role: Role) -> dict[Group, tuple[str, ...]]:
    """Sets of weights that members ask of a role, and of each the modules, the weights' own among them or not."""
    found: dict[Group, dict[str, None]] = {}
    apart: set[str] = set()
    """Weights that answer what others wrote: two streams find their pages again, and take none that others wrote."""
    for row in rows.values():
        wanted: tuple[str, ...]
        if role == PREFILL:
            wanted, two = (row.prompt_writer,), False
        else:
            wanted, two = (row.answer_writer, row.speaker), row.two_rows
            _refuse_apart(family, row)
        weights = family.module(wanted[0]).weights
        found.setdefault((weights, two), {}).update(dict.fromkeys(wanted))
        if row.prompt_writer != row.answer_writer:
            apart.add(weights)
    for weights, two in [group for group in found if not group[1]]:
        alone = set(found[weights, two]) <= {weights} and weights not in apart
        if (weights, True) in found and alone and role != PREFILL:
            found[weights, True].update(found.pop((weights, two)))  # the weights alone are at home there, too
    return {group: tuple(modules) for group, modules in found.items()}


def _refuse_apart(family: Family, row: Row) -> None:
    if row.two_rows:
        writer, speaker = family.module(row.answer_writer), family.module(row.speaker)
        if speaker.base is None or speaker.weights != writer.name:
            raise Refused(
                f"{row.speaker!r} speaks what {row.answer_writer!r} writes: on vLLM that wants an adapter on those very "
                "weights; serve this member without --engine vllm: the embedded engine runs any two modules"
            )


def servers_of(cluster: Cluster, family: Family, rows: Mapping[str, Row]) -> dict[str, Server]:
    """What each place's server holds. Refused, by name, for what one server cannot hold or a row cannot be played by."""
    hosted = {place.name: place.modules or () for place in cluster.places}
    found = {}
    for place in cluster.places:
        weights = {family.module(name).weights for name in hosted[place.name]}
        if len(weights) != 1:
            raise Refused(
                f"worker {place.name!r} would host {', '.join(hosted[place.name]) or 'nothing'}, of {len(weights)} sets of "
                "weights: a vLLM server holds one; make a worker of each"
            )
        adapters = tuple(n for n in hosted[place.name] if family.module(n).base is not None)
        found[place.name] = Server(place, weights.pop(), adapters, _two_streams(place, rows))
    for member, row in rows.items():
        _refuse_unplayable(cluster, member, row)
    return found


def _two_streams(place: Place, rows: Mapping[str, Row]) -> bool:
    """Whether its adapters only speak; Refused where some do and others write as well."""
    here = set(place.modules or ())
    if DECODE not in place.roles:
        return False
    mute = {m: r for m, r in rows.items() if r.two_rows and {r.answer_writer, r.speaker} <= here}
    if not mute:
        return False
    loud = [m for m, r in rows.items() if not r.two_rows and r.speaker in here and r.speaker != _writer(mute)]
    if loud:
        raise Refused(
            f"worker {place.name!r}: member {next(iter(mute))!r} speaks what another module writes, {loud[0]!r} writes for "
            "itself; one vLLM server does one of these: make two workers"
        )
    return True


def _writer(rows: Mapping[str, Row]) -> str:
    return next(iter(rows.values())).answer_writer


def _refuse_unplayable(cluster: Cluster, member: str, row: Row) -> None:
    """Where prompt and answer have two writers, they must be read and answered by different servers."""
    if row.prompt_writer == row.answer_writer:
        return
    reads = [p for p in cluster.places if p.roles == (PREFILL,) and row.prompt_writer in (p.modules or ())]
    answers = [p for p in cluster.places if p.roles == (DECODE,) and row.speaker in (p.modules or ())]
    if not reads or not answers:
        raise Refused(
            f"member {member!r}: {row.prompt_writer!r} writes its prompts and {row.answer_writer!r} its answers, so it "
            "takes a vLLM worker with roles [prefill] and another with roles [decode]"
        )


def with_modules(cluster: Cluster, family: Family, rows: Mapping[str, Row]) -> Cluster:
    """Every place's modules: those of the file, or, dealt out among places of a role that name none, what rows ask.

    Refused, with the numbers, where members ask more sets of weights than there are servers for them.
    """
    places = list(cluster.places)
    for role in (DECODE, PREFILL):  # who does both answers what it reads
        open_ = [n for n, place in enumerate(places) if place.modules is None and role in place.roles]
        if not open_:
            continue
        every = groups_of(family, rows, role)
        named = {m for place in places if role in place.roles for m in place.modules or ()}
        groups = {group: modules for group, modules in every.items() if not set(modules) <= named} or every
        if len(groups) > len(open_):
            names = ", ".join(weights + (" in two streams" if two else "") for weights, two in groups)
            raise Refused(
                f"members ask {len(groups)} sets of weights of role {role} ({names}), and a vLLM server holds one: "
                f"there are {len(open_)} workers for them; start {len(groups)} or more (--{role}-workers), serve fewer "
                "members (--member), or serve without --engine vllm"
            )
        for turn, n in enumerate(open_):
            places[n] = replace(places[n], modules=list(groups.values())[turn % len(groups)])
    return replace(cluster, places=tuple(places))
