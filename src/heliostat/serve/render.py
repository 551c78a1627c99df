"""The commands of a cluster of vLLM servers, module by module, as texts that other people's tools start: units of systemd,
manifests of Kubernetes, the configuration of an application of Ray Serve. Nothing is started here.

Keys are never written: texts name the variable, or the secret, that holds them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from heliostat.errors import Refused
from heliostat.serve.nodes import CPU, Standing
from heliostat.vllm.launch import Command

FORMATS = ("systemd", "kubernetes", "ray")
KEY = "VLLM_API_KEY"
"""The variable in which vLLM looks for its key."""
SECRET = "heliostat-key"
"""Name of the Kubernetes secret that holds it, under ``key``."""
CLUSTER_FILE = "cluster.yaml"
ROUTER_PORT = 8000
STOP_SECONDS = 60
STARTS = 180
"""Times that Kubernetes looks, ten seconds apart, until it starts again what has not begun."""


@dataclass(frozen=True, slots=True)
class Started:
    """One server: where it stands, and its exact command."""

    standing: Standing
    command: Command
    environment: Mapping[str, str]
    """The command's, and the devices that it may see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What texts take from whoever asks for them."""

    family: str
    """Path of the family's folder on the nodes, where it lies with its ``exports``."""
    python: str
    """Interpreter with vLLM and heliostat on the nodes."""
    image: str = "heliostat-vllm"
    """Of containers."""
    address: str = "0.0.0.0"
    """On which the router listens."""
    keys: str = "keys.yaml"
    """File of API keys of the router's clients, beside the cluster file."""


def rendered(form: str, started: Sequence[Started], cluster: str, means: Means) -> dict[str, str]:
    """File name -> text. ``cluster``: text of the cluster file. Refused for a format that there is not."""
    makers = {"systemd": systemd, "kubernetes": kubernetes, "ray": ray}
    if form not in makers:
        raise Refused(f"--format {form}: there is {', '.join(FORMATS)}")
    return {CLUSTER_FILE: cluster, **makers[form](started, cluster, means)}


def router_words(means: Means, folder: str) -> list[str]:
    """The command of our server in front."""
    there = str(PurePosixPath(means.python).with_name("heliostat")) if "/" in means.python else "heliostat"
    words = [there, "serve", means.family, "--cluster", f"{folder}/{CLUSTER_FILE}"]
    return [*words, "--host", means.address, "--port", str(ROUTER_PORT), "--keys", f"{folder}/{means.keys}"]


# ---- systemd


def systemd(started: Sequence[Started], cluster: str, means: Means) -> dict[str, str]:
    """A unit for each server, in a folder for each node, and the router's."""
    found = {}
    for one in started:
        name = f"heliostat-{one.standing.name}.service"
        found[f"{one.standing.node.name}/{name}"] = _unit(
            f"heliostat: vLLM server {one.standing.name} ({', '.join(one.standing.modules)})",
            one.command.words,
            one.environment,
        )
    words = router_words(means, "/etc/heliostat")
    found["router/heliostat-router.service"] = _unit("heliostat: router", words, {})
    return found


def _unit(what: str, words: Sequence[str], environment: Mapping[str, str]) -> str:
    lines = [
        "[Unit]",
        f"Description={what}",
        "After=network-online.target",
        "Wants=network-online.target",
        "StartLimitIntervalSec=0",
        "",
    ]
    lines += ["[Service]", "Type=exec"]
    lines += [f"Environment={_quoted(f'{name}={value}')}" for name, value in environment.items()]
    lines += [f"# {KEY}=..., readable by root only", "EnvironmentFile=/etc/heliostat/key.env"]
    lines += [f"ExecStart={' '.join(map(_quoted, words))}"]
    lines += ["Restart=always", "RestartSec=5"]
    lines += [
        f"TimeoutStopSec={STOP_SECONDS}",
        "KillMode=mixed",
        "NoNewPrivileges=true",
        "PrivateTmp=true",
        "",
    ]
    return "\n".join([*lines, "[Install]", "WantedBy=multi-user.target", ""])


def _quoted(word: str) -> str:
    """As systemd reads it: no variable and no specifier is meant."""
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$").replace("%", "%%")
    return plain if word and all(c.isalnum() or c in "/._=-:+,@#" for c in word) else f'"{plain}"'


# ---- Kubernetes


def kubernetes(started: Sequence[Started], cluster: str, means: Means) -> dict[str, str]:
    """A Deployment and a Service for each slot of a node, and the router's, in one file.

    Servers of one slot share its devices, which Kubernetes gives to one container: they stand in one.
    """
    slots: dict[tuple[str, tuple[int, ...]], list[Started]] = {}
    for one in started:
        slots.setdefault((one.standing.node.name, one.standing.devices), []).append(one)
    documents = [_config_map(cluster)]
    for together in slots.values():
        label = "-".join(one.standing.name for one in together)[:63].rstrip("-")
        documents.append(_deployment(together, label, means))
        documents += [_service(one, label) for one in together]
    documents += _router(means)
    return {"kubernetes.yaml": yaml.safe_dump_all(documents, sort_keys=False, width=10**6)}


def _config_map(cluster: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "heliostat-cluster"},
        "data": {CLUSTER_FILE: cluster},
    }


def _deployment(together: Sequence[Started], label: str, means: Means) -> dict[str, Any]:
    first = together[0].standing
    resources = {} if first.node.device == CPU else {"limits": {"nvidia.com/gpu": len(first.devices)}}
    container = {
        "name": "vllm",
        "image": means.image,
        "command": ["/bin/bash", "-c", _together(together)],
        "env": [_secret()],
        "ports": [{"containerPort": one.standing.port} for one in together],
        "resources": resources,
        "readinessProbe": _probe("/health", first.port, 10),
        "startupProbe": {**_probe("/health", first.port, 10), "failureThreshold": STARTS},
        "volumeMounts": [_mount("family", means.family, read_only=True), _mount("shm", "/dev/shm")],
    }
    pod = {
        "containers": [container],
        "nodeSelector": {"kubernetes.io/hostname": first.node.name},
        "terminationGracePeriodSeconds": STOP_SECONDS,
        "volumes": [*_family(), {"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    return _deployed(f"heliostat-{label}"[:63].rstrip("-"), {"heliostat": label}, pod)


def _together(together: Sequence[Started]) -> str:
    """All servers of a slot; when one ends the container does, and is started again."""
    lines = []
    for one in together:
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in one.environment.items())
        lines.append(f"{settings} {shlex.join(one.command.words)}")
    if len(lines) == 1:
        return f"exec env {lines[0]}"
    return "\n".join([*(f"env {line} &" for line in lines), "wait -n"])


def service_name(server: str) -> str:
    """The name at which a server is reached in Kubernetes."""
    return f"heliostat-{server}"


def _service(one: Started, label: str) -> dict[str, Any]:
    """A name for one server: the cluster file's urls are made of these. It is there before the server is ready, which
    the router looks for itself."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": service_name(one.standing.name)},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {"heliostat": label},
            "ports": [{"port": one.standing.port}],
        },
    }


def _router(means: Means) -> list[dict[str, Any]]:
    container = {
        "name": "router",
        "image": means.image,
        "command": router_words(means, "/etc/heliostat"),
        "env": [_secret()],
        "ports": [{"containerPort": ROUTER_PORT}],
        # It listens when the servers it waits for have loaded their weights.
        "startupProbe": {**_probe("/live", ROUTER_PORT, 10), "failureThreshold": STARTS},
        "readinessProbe": _probe("/health", ROUTER_PORT, 5),
        "livenessProbe": _probe("/live", ROUTER_PORT, 10),
        "volumeMounts": [_mount("family", means.family, read_only=True), _mount("cluster", "/etc/heliostat")],
    }
    sources = [{"configMap": {"name": "heliostat-cluster"}}, {"secret": {"name": "heliostat-keys"}}]
    pod = {
        "containers": [container],
        "terminationGracePeriodSeconds": STOP_SECONDS,
        "volumes": [*_family(), {"name": "cluster", "projected": {"sources": sources}}],
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "heliostat"},
        "spec": {"selector": {"heliostat": "router"}, "ports": [{"port": ROUTER_PORT}]},
    }
    return [_deployed("heliostat-router", {"heliostat": "router"}, pod), service]


def _deployed(name: str, labels: Mapping[str, str], pod: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": dict(labels)},
            "template": {"metadata": {"labels": dict(labels)}, "spec": dict(pod)},
        },
    }


def _probe(path: str, port: int, seconds: int) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": port}, "periodSeconds": seconds, "timeoutSeconds": 5}


def _secret() -> dict[str, Any]:
    return {"name": KEY, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": "key"}}}


def _family() -> list[dict[str, Any]]:
    return [{"name": "family", "persistentVolumeClaim": {"claimName": "heliostat-family", "readOnly": True}}]


def _mount(name: str, path: str, *, read_only: bool = False) -> dict[str, Any]:
    return {"name": name, "mountPath": path, **({"readOnly": True} if read_only else {})}


# ---- Ray Serve


def ray(started: Sequence[Started], cluster: str, means: Means) -> dict[str, str]:
    """The configuration for ``serve deploy``: one deployment for each server, and the router's. Refused where servers that
    are spread over several GPUs share them: Ray gives parts of one GPU only."""
    for one in started:
        at = one.standing
        if at.beside > 1 and len(at.devices) > 1 and at.node.device != CPU:
            raise Refused(
                f"on node {at.node.name!r} {at.beside} servers share {len(at.devices)} GPUs, and "
                "Ray gives parts of one GPU only: add nodes, say tensor_parallel: 1, or take --format systemd"
            )
    servers = [
        {
            "name": one.standing.name,
            "words": list(one.command.words),
            "environment": dict(one.environment),
            "port": one.standing.port,
            "gpus": 0 if one.standing.node.device == CPU else len(one.standing.devices) / one.standing.beside,
            "address": one.standing.node.address,
        }
        for one in started
    ]
    application = {
        "name": "heliostat",
        "route_prefix": "/",
        "import_path": "heliostat.serve.ray_app:application",
        "args": {
            "family": means.family,
            "cluster": cluster,
            "keys": f"/etc/heliostat/{means.keys}",
            "servers": servers,
        },
    }
    content = {"http_options": {"host": means.address, "port": ROUTER_PORT}, "applications": [application]}
    return {"ray.yaml": yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False, width=10**6)}
