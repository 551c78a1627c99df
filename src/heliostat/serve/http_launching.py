"""From a cluster to the exact words that start each of its vLLM servers: what all have in common, and each one's own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from heliostat.build import BASE, device_named
from heliostat.errors import Refused
from heliostat.family import Family
from heliostat.model.config import read_config
from heliostat.serve.cluster import Cluster, Place, Terms
from heliostat.serve.http_facts import wire_role
from heliostat.serve.http_layout import Server
from heliostat.serve.processes import Means
from heliostat.vllm.launch import Hosted, Launch
from heliostat.vllm.layout import architecture, fit, prepared, zero_adapter

KEPT = "/dev/shm/heliostat-vllm"
"""Where servers of one machine keep what they wrote for others, unless they are started by a server of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What all servers of a cluster share."""

    terms: Terms
    dtype: str
    device: str
    max_length: int
    max_running: int
    cache: int
    """MiB for pages, where a place does not say how much memory it has."""
    fits: Mapping[int, str]
    """By degree of tensor parallelism: pages of one degree mean nothing to another."""
    hosted: Mapping[str, Hosted]
    """By the family's names; empty where nothing is started here."""
    zeros: Mapping[str, str]
    """Weights -> folder of an adapter that changes nothing."""
    architectures: Mapping[str, str]

    def cache_mib(self, place: Place) -> int:
        """For pages; on a GPU vLLM takes what its share of the memory leaves."""
        return self.cache if place.memory is None else min(self.cache, place.memory)


def common_of(cluster: Cluster, family: Family, means: Means, *, write: bool) -> Common:
    """What the servers of a cluster share; with ``write`` their modules are exported, once each, for them to load."""
    folder, terms, device = means.family, cluster.terms, device_named(means.device)
    degrees = {place.tensor_parallel for place in cluster.places}
    dtype = terms.dtype or (means.dtype if means.dtype != "auto" else "bfloat16")
    longest = read_config(folder / BASE).max_length
    most = terms.max_length or means.max_length or longest
    if most > longest:
        raise Refused(f"max_length is {most}; the base runs {longest} tokens exactly, and no more")
    fits = {
        degree: fit(folder, family, dtype=dtype, page_size=terms.page_size, tensor_parallel=degree)
        for degree in degrees
    }
    names = [name for place in cluster.places for name in place.modules or ()]
    weights = dict.fromkeys(family.module(name).weights for name in names)
    riding = dict.fromkeys(family.module(n).weights for n in names if family.module(n).base is not None)
    return Common(
        terms=replace(terms, dtype=dtype, max_length=most),
        dtype=dtype,
        device=device,
        max_length=most,
        max_running=means.max_running,
        cache=means.cache_mib,
        fits=fits,
        hosted=prepared(folder, family, [*weights, *names]) if write else {},
        zeros={name: zero_adapter(folder, family, name) for name in riding} if write else {},
        architectures={name: architecture(folder, family, name) for name in weights},
    )


def key_of(terms: Terms) -> str:
    """The key that the servers want, out of the environment; empty: none. Refused where it is not there."""
    if terms.key_env is None:
        return ""
    if not (found := os.environ.get(terms.key_env, "")):
        raise Refused(f"the cluster file's key_env is {terms.key_env!r}, and no such variable is set here")
    return found


def launch_of(
    common: Common,
    server: Server,
    *,
    port: int,
    host: str = "127.0.0.1",
    cores: str = "",
    folder: str = KEPT,
    incarnation: str = "",
    extra: tuple[str, ...] = (),
) -> Launch:
    """How one server is started."""
    place = server.place
    return Launch(
        name=place.name,
        weights=common.hosted[server.weights],
        adapters=tuple(common.hosted[name] for name in server.adapters),
        zero=common.zeros.get(server.weights, "") if server.adapters else "",
        role=wire_role(place.roles),
        two_streams=server.two_streams,
        architecture=common.architectures[server.weights],
        dtype=common.dtype,
        page_size=common.terms.page_size,
        max_length=common.max_length,
        max_running=common.max_running,
        cache_mib=common.cache_mib(place),
        device="cpu" if common.device == "cpu" else "cuda",
        cores=cores,
        tensor_parallel=place.tensor_parallel,
        host=host,
        port=port,
        transfer=common.terms.transfer,
        folder=folder,
        fit=common.fits[place.tensor_parallel],
        incarnation=incarnation,
        extra=extra,
    )


def cores_of(places: Sequence[Place], count: int | None = None) -> dict[str, str]:
    """Place -> its processors (``0-3``), one after the other and from the first again where there are not enough.

    Processes that are not told all sit on the first one.
    """
    count = count or os.cpu_count() or 1
    share, start, found = max(1, count // max(1, len(places))), 0, {}
    for place in places:
        threads = min(count, place.threads or share)
        if start + threads > count:
            start = 0
        found[place.name] = str(start) if threads == 1 else f"{start}-{start + threads - 1}"
        start += threads
    return found
