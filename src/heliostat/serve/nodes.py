"""Machines for vLLM servers: which server stands on which devices, with how much of their memory. No torch.

Several servers of one machine, or of one device, stand side by side, each with a share of the memory that its weights
and an equal part of what is left make up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from heliostat.errors import Refused
from heliostat.family import NAME
from heliostat.files import read_yaml
from heliostat.serve.cluster import ROLES, Terms, counted, refuse_unknown, terms_of, words
from heliostat.serve.http_layout import Group
from heliostat.serve.protocol import Role

EXAMPLE = "lines like `nodes: [{name: n1, address: 10.0.0.1, devices: 8, memory: 81920}]`"
CUDA, CPU = "cuda", "cpu"
USED = 0.9
"""Part of a device's memory that servers take together."""
OVERHEAD_MIB = 2048
"""What a server takes besides weights and pages: workspace, its libraries. An estimate."""
LEAST_PAGES_MIB = 256
"""A server with less room for pages is not worth starting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine."""

    name: str
    address: str
    """As the others reach it."""
    device: str = CUDA
    devices: int = 1
    """GPUs; on a CPU node the cores."""
    memory: int
    """MiB of one GPU; of a CPU node all that servers may take."""
    roles: tuple[Role, ...] = ROLES
    tensor_parallel: int = 1
    """Devices that each server here is spread over."""
    port: int = 8001
    """Of the first server; the others have those after it."""

    @property
    def slots(self) -> tuple[tuple[int, ...], ...]:
        """Devices that servers stand on together: on a CPU node all cores are one."""
        if self.device == CPU:
            return (tuple(range(self.devices)),)
        step = self.tensor_parallel
        return tuple(tuple(range(n, n + step)) for n in range(0, self.devices - step + 1, step))

    @property
    def room(self) -> int:
        """MiB of a slot."""
        return self.memory if self.device == CPU else int(self.memory * self.tensor_parallel * USED)


@dataclass(frozen=True, slots=True)
class Nodes:
    """What a file of them says."""

    nodes: tuple[Node, ...]
    terms: Terms
    router: str
    """Address on which our server listens."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One server and where it stands."""

    name: str
    role: Role
    group: Group
    modules: tuple[str, ...]
    node: Node
    devices: tuple[int, ...]
    port: int
    weights_mib: int
    pages_mib: int
    beside: int
    """Servers of the same slot, itself included."""

    @property
    def share(self) -> float:
        """Of the slot's memory, for weights, pages and workspace."""
        size = self.weights_mib + self.pages_mib + OVERHEAD_MIB
        return round(size / (self.node.memory * max(1, self.node.tensor_parallel)), 3)

    @property
    def url(self) -> str:
        """Where it is asked."""
        address = f"[{self.node.address}]" if ":" in self.node.address else self.node.address
        return f"http://{address}:{self.port}"


@dataclass(slots=True)
class _Slot:
    node: Node
    devices: tuple[int, ...]
    taken: list[tuple[Role, Group, int]]

    @property
    def left(self) -> int:
        return self.node.room - sum(size for _, _, size in self.taken)


def read(path: Path) -> Nodes:
    """The machines of a YAML file; what is wrong with it is refused with the place."""
    content = read_yaml(path, what=f"file of nodes: it should hold {EXAMPLE}")
    refuse_unknown(content, ("vllm", "router", "nodes"), where=str(path))
    listed = content.get("nodes")
    if not isinstance(listed, list) or not listed:
        raise Refused(f"{path}: nodes is {listed!r}; it must be a list, {EXAMPLE}")
    nodes = tuple(_node(values, where=f"{path}: nodes[{n}]") for n, values in enumerate(listed))
    names = [node.name for node in nodes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Refused(f"{path}: two nodes are called {twice[0]!r}")
    router = content.get("router", nodes[0].address)
    if not isinstance(router, str):
        raise Refused(f"{path}: router is {router!r}; it must be an address")
    terms = content.get("vllm", {})
    if isinstance(terms, dict):  # between machines unless somebody says otherwise, and never without a key
        terms = {"transfer": "nixl", "key_env": "VLLM_API_KEY", **terms}
    return Nodes(nodes, terms_of(terms, where=f"{path}: vllm"), router)


def _node(values: Any, *, where: str) -> Node:
    if not isinstance(values, dict):
        raise Refused(f"{where} is {values!r}; it must hold {EXAMPLE}")
    refuse_unknown(values, [field.name for field in fields(Node)], where=where)
    name, address, device = values.get("name"), values.get("address"), values.get("device", CUDA)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise Refused(f"{where}: {name!r} is no name: letters, digits, '.', '_', '-', at most 64")
    if not isinstance(address, str) or not address:
        raise Refused(f"{where}: address is {address!r}; it must be one that the other machines reach")
    if device not in (CUDA, CPU):
        raise Refused(f"{where}: device is {device!r}; allowed are {CUDA}, {CPU}")
    if (memory := counted(values.get("memory"), f"{where}: memory (MiB)")) is None:
        raise Refused(
            f"{where}: memory is missing: MiB of one GPU, or those that servers of a CPU node may take"
        )
    roles = tuple(words(values.get("roles", list(ROLES)), f"{where}: roles"))
    if not roles or (strange := [role for role in roles if role not in ROLES]):
        raise Refused(f"{where}: roles is {values.get('roles')!r}; allowed are {', '.join(ROLES)}")
    assert not strange
    numbers = {
        what: counted(values.get(what), f"{where}: {what}") for what in ("devices", "tensor_parallel", "port")
    }
    node = Node(
        name=name,
        address=address,
        device=device,
        memory=memory,
        roles=tuple(role for role in ROLES if role in roles),
        **{what: value for what, value in numbers.items() if value is not None},
    )
    if not node.slots:
        raise Refused(
            f"{where}: tensor_parallel is {node.tensor_parallel}, and it has {node.devices} devices"
        )
    return node


def placed(
    nodes: Sequence[Node], wanted: Mapping[Role, Mapping[Group, tuple[str, ...]]], sizes: Mapping[str, int]
) -> tuple[Standing, ...]:
    """Every set of weights that a role needs on some node, large ones first, where most room is left; then whatever
    slots are empty get one more of the sets that have fewest, so that no device is idle.

    ``sizes``: MiB of each module. Refused, with the numbers, where one has no room.
    """
    slots = [_Slot(node, devices, []) for node in nodes for devices in node.slots]
    needs = [
        (role, group, sum(sizes[name] for name in dict.fromkeys((group[0], *modules))))
        for role, groups in wanted.items()
        for group, modules in groups.items()
    ]
    for role, group, size in sorted(needs, key=lambda need: -need[2]):
        whole = size + OVERHEAD_MIB + LEAST_PAGES_MIB
        able = [slot for slot in slots if role in slot.node.roles and slot.left >= whole]
        if not able:
            _refuse_full(role, group, whole, slots)
        max(able, key=lambda slot: slot.left).taken.append((role, group, size + OVERHEAD_MIB))
    for slot in slots:
        if not slot.taken:
            _again(slot, slots, needs)
    return _standings(slots, wanted)


def _again(slot: _Slot, slots: Sequence[_Slot], needs: Sequence[tuple[Role, Group, int]]) -> None:
    able = [
        need
        for need in needs
        if need[0] in slot.node.roles and need[2] + OVERHEAD_MIB + LEAST_PAGES_MIB <= slot.left
    ]
    if able:
        there = [(role, group) for other in slots for role, group, _ in other.taken]
        role, group, size = min(able, key=lambda need: there.count(need[:2]))
        slot.taken.append((role, group, size + OVERHEAD_MIB))


def _refuse_full(role: Role, group: Group, whole: int, slots: Sequence[_Slot]) -> None:
    left = ", ".join(f"{slot.node.name} {slot.left} MiB" for slot in slots if role in slot.node.roles)
    raise Refused(
        f"{group[0]!r} with role {role} takes {whole} MiB with its adapters, workspace and {LEAST_PAGES_MIB} MiB of pages, "
        f"and there is left: {left or f'no node with role {role}'}; add nodes, spread servers over more devices "
        "(tensor_parallel), or tune adapters instead of whole modules"
    )


def _standings(
    slots: Sequence[_Slot], wanted: Mapping[Role, Mapping[Group, tuple[str, ...]]]
) -> tuple[Standing, ...]:
    found: list[Standing] = []
    counts: dict[str, int] = dict.fromkeys(ROLES, 0)
    ports: dict[str, int] = {}
    for slot in slots:
        for role, group, size in slot.taken:
            port = ports.get(slot.node.name, slot.node.port)
            ports[slot.node.name] = port + 1
            found.append(
                Standing(
                    name=f"{role}-{counts[role]}",
                    role=role,
                    group=group,
                    modules=wanted[role][group],
                    node=slot.node,
                    devices=slot.devices,
                    port=port,
                    weights_mib=size - OVERHEAD_MIB,
                    pages_mib=slot.left // len(slot.taken),
                    beside=len(slot.taken),
                )
            )
            counts[role] += 1
    return tuple(found)


HEADS = ("server", "node", "devices", "modules", "weights MiB", "pages MiB", "servers beside it")


def told(standings: Sequence[Standing]) -> list[list[str]]:
    """The servers as rows of a table with ``HEADS``."""
    return [
        [
            one.name,
            one.node.name,
            ",".join(map(str, one.devices)) if one.node.device != CPU else CPU,
            ", ".join(one.modules) + (" (two streams)" if one.group[1] else ""),
            str(one.weights_mib),
            str(one.pages_mib),
            str(one.beside - 1),
        ]
        for one in standings
    ]
