"""Texts of the tiny family, and what those who read them find there."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import yaml

from heliostat.serve.cluster import Terms
from heliostat.serve.nodes import EVERYWHERE, Node, Nodes
from heliostat.serve.render import Means
from heliostat.serve.rendering import texts
from heliostat.vllm.asked import Settings

GPU = Node(name="n1", address="10.0.0.1", devices=2, memory=40960)
SECOND = replace(GPU, name="n2", address="10.0.0.2")
CPU = Node(name="n2", address="10.0.0.2", device="cpu", devices=4, memory=65536)
TERMS = Terms(transfer="nixl", key_env="VLLM_API_KEY", dtype="float32")
MEANS = Means(family="/srv/fam", python="/opt/heliostat/bin/python")


def made(
    folder: Path,
    form: str,
    *nodes: Node,
    terms: Terms = TERMS,
    router: str = EVERYWHERE,
    means: Means = MEANS,
    **more: Any,
) -> dict[str, str]:
    return texts(folder, Nodes(nodes or (GPU, SECOND), terms, router), form, means, **more)


def containers(manifests: str) -> list[Any]:
    """Of all pods, the router's last."""
    pods = [d["spec"]["template"] for d in yaml.safe_load_all(manifests) if d["kind"] == "Deployment"]
    return [container for pod in pods for container in pod["spec"]["containers"]]


def words_of(unit: str) -> list[str]:
    (line,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    return [
        word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line.removeprefix("ExecStart="))
    ]


def settings_of(environment: dict[str, str]) -> Settings:
    return msgspec.json.decode(environment["HELIOSTAT_WORKER"], type=Settings)


def router_of(manifests: str) -> Any:
    """The router's container."""
    *_, found = containers(manifests)
    assert found["name"] == "router"
    return found
