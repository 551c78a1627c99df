"""From a family and a file of nodes to the texts that start its vLLM servers there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from heliostat.build import read_family
from heliostat.engine.ledger import MIB, weights_of
from heliostat.errors import Refused
from heliostat.family import BASE, Family, Row
from heliostat.llm import parse_dtype
from heliostat.serve import render
from heliostat.serve.cluster import DECODE, PREFILL, Cluster, Place
from heliostat.serve.http_launching import Common, common_of, cores_of, launch_of
from heliostat.serve.http_layout import Server, groups_of, servers_of
from heliostat.serve.nodes import CPU, CUDA, Nodes, Standing, placed
from heliostat.serve.processes import Means
from heliostat.vllm.launch import FILES, NIXL, Launch, command
from heliostat.vllm.layout import refuse_unfit


@dataclass(frozen=True, slots=True)
class Sized:
    """Servers and where they stand."""

    family: Family
    rows: Mapping[str, Row]
    standings: tuple[Standing, ...]


def sized(folder: Path, nodes: Nodes, members: Sequence[str] | None = None) -> Sized:
    """Which servers a family's members take, and where each has room. Refused, with the numbers, where one has none."""
    family = read_family(folder)
    rows = {name: family.row(name) for name in members or [*family.members, BASE]}
    refuse_unfit(folder, family, rows)
    wanted = {role: groups_of(family, rows, role) for role in (PREFILL, DECODE)}
    dtype = parse_dtype(nodes.terms.dtype or "bfloat16")
    names = {name for groups in wanted.values() for group, own in groups.items() for name in (group[0], *own)}
    sizes = {}
    for name in names:
        weights = family.module(name).weights
        there = () if weights == name else (weights,)
        sizes[name] = -(-weights_of(folder, family, [name], dtype=dtype, there=there).total // MIB)
    return Sized(family, rows, placed(nodes.nodes, wanted, sizes))


def texts(
    folder: Path, nodes: Nodes, form: str, means: render.Means, members: Sequence[str] | None = None
) -> dict[str, str]:
    """File name -> text, in one of ``render.FORMATS``. The modules are exported, once each, for vLLM to load."""
    found = sized(folder, nodes, members)
    _refuse_apart(nodes, found, form)
    places = [_place(one, form) for one in found.standings]
    cluster = Cluster(tuple(places), means.family, nodes.terms)
    cluster.refuse_unreachable()
    servers = servers_of(cluster, found.family, found.rows)
    settings = Means(family=folder.resolve(), max_length=nodes.terms.max_length)
    common = common_of(cluster, found.family, settings, write=True)
    started = [
        _started(common, servers[one.name], one, found, folder, form, means) for one in found.standings
    ]
    return render.rendered(form, started, replace(cluster, terms=common.terms).to_yaml(), means)


def _refuse_apart(nodes: Nodes, found: Sized, form: str) -> None:
    if nodes.terms.transfer != FILES:
        return
    if form == "kubernetes" or len({one.node.name for one in found.standings}) > 1:
        raise Refused(
            f"transfer is {FILES!r}, which is for servers that share one machine's memory: pods and other nodes do not; "
            f"say transfer: {NIXL}"
        )


def _place(one: Standing, form: str) -> Place:
    url = f"http://{render.service_name(one.name)}:{one.port}" if form == "kubernetes" else one.url
    return Place(
        name=one.name,
        spawn=None,
        url=url,
        modules=one.modules,
        roles=(one.role,),
        tensor_parallel=one.node.tensor_parallel,
    )


def _started(
    common: Common, server: Server, one: Standing, found: Sized, folder: Path, form: str, means: render.Means
) -> render.Started:
    host = "0.0.0.0" if form == "kubernetes" else one.node.address
    cpu = one.node.device == CPU
    launch = launch_of(common, server, port=one.port, host=host, cores=_cores(one, found) if cpu else "")
    launch = replace(launch, device=CPU if cpu else CUDA, cache_mib=one.pages_mib)
    if not cpu:
        launch = replace(launch, extra=("--gpu-memory-utilization", f"{one.share:g}"))
    made = command(_moved(launch, folder.resolve(), means.family), python=means.python)
    environment = dict(made.environment)
    if not cpu and form == "systemd":  # Ray gives devices itself, and a container sees its own only
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, one.devices))
    if (
        common.terms.transfer == NIXL and form == "kubernetes"
    ):  # it listens everywhere, and is met by its name
        environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] = render.service_name(one.name)
    return render.Started(one, made, environment)


def _cores(one: Standing, found: Sized) -> str:
    beside = [Place(name=other.name) for other in found.standings if other.node.name == one.node.name]
    return cores_of(beside, one.node.devices)[one.name]


def _moved(launch: Launch, here: Path, there: str) -> Launch:
    """The same where the family's folder lies elsewhere."""

    def moved(path: str) -> str:
        return f"{there.rstrip('/')}/{Path(path).relative_to(here).as_posix()}" if path else ""

    return replace(
        launch,
        weights=replace(launch.weights, folder=moved(launch.weights.folder)),
        adapters=tuple(replace(module, folder=moved(module.folder)) for module in launch.adapters),
        zero=moved(launch.zero),
    )
