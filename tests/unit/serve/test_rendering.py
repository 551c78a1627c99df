"""Texts that start vLLM servers elsewhere, held to what those who read them parse."""

import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from heliostat.errors import Refused
from heliostat.serve.cluster import Terms
from heliostat.serve.cluster import read as read_cluster
from heliostat.serve.nodes import Node, Nodes
from heliostat.serve.render import Means, rendered
from heliostat.serve.rendering import sized, texts
from heliostat.vllm.asked import Settings

GPU = Node(name="n1", address="10.0.0.1", devices=2, memory=40960)
CPU = Node(name="n2", address="10.0.0.2", device="cpu", devices=4, memory=65536)
TERMS = Terms(transfer="nixl", key_env="VLLM_API_KEY", dtype="float32")
MEANS = Means(family="/srv/fam", python="/opt/heliostat/bin/python")


def made(folder: Path, form: str, *nodes: Node, terms: Terms = TERMS, **more: Any) -> dict[str, str]:
    return texts(folder, Nodes(nodes or (GPU, CPU), terms, "10.0.0.1"), form, MEANS, **more)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "very secret")


def words_of(unit: str) -> list[str]:
    (line,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    return [
        word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line.removeprefix("ExecStart="))
    ]


def settings_of(environment: dict[str, str]) -> Settings:
    return msgspec.json.decode(environment["HELIOSTAT_WORKER"], type=Settings)


def test_units_say_every_server_exactly(tiny_family: Path, tmp_path: Path) -> None:
    found = made(tiny_family, "systemd")
    (tmp_path / "cluster.yaml").write_text(found["cluster.yaml"])
    cluster = read_cluster(tmp_path / "cluster.yaml")
    assert cluster.family == "/srv/fam" and {place.engine for place in cluster.places} == {"vllm"}
    for place in cluster.places:
        (unit,) = [text for name, text in found.items() if name.endswith(f"heliostat-{place.name}.service")]
        words = words_of(unit)
        assert words[:4] == ["/opt/heliostat/bin/python", "-m", "vllm.entrypoints.cli.main", "serve"]
        assert words[4].startswith("/srv/fam/exports/vllm/")
        assert place.url == f"http://{words[words.index('--host') + 1]}:{words[words.index('--port') + 1]}"
        lines = [
            line.removeprefix("Environment=") for line in unit.splitlines() if line.startswith("Environment=")
        ]
        environment = dict(shlex.split(line)[0].split("=", 1) for line in lines)
        settings = settings_of(environment)
        assert settings.worker == place.name and settings.role == place.roles[0]
        assert {name.partition("#")[0] for name in settings.modules} >= set(place.modules or ())
        assert environment["VLLM_NIXL_SIDE_CHANNEL_HOST"] in (place.url or "")
    router = words_of(found["router/heliostat-router.service"])
    assert router[:2] == ["/opt/heliostat/bin/heliostat", "serve"] and "--keys" in router


def test_no_text_holds_a_key(tiny_family: Path) -> None:
    for form in ("systemd", "kubernetes", "ray"):
        found = made(tiny_family, form)
        assert not any("very secret" in text for text in found.values())


def test_systemd_takes_the_units(tiny_family: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not there")
    paths = []
    for name, text in made(tiny_family, "systemd").items():
        if name.endswith(".service"):
            path = tmp_path / Path(name).name
            path.write_text(
                text.replace("/opt/heliostat/bin/python", "/bin/true").replace(
                    "/opt/heliostat/bin/heliostat", "/bin/true"
                )
            )
            paths.append(str(path))
    run = subprocess.run(["systemd-analyze", "verify", "--man=no", *paths], capture_output=True, text=True)
    told = [line for line in run.stderr.splitlines() if any(Path(path).name in line for path in paths)]
    assert not told, told


def test_manifests_are_whole(tiny_family: Path, tmp_path: Path) -> None:
    found = made(tiny_family, "kubernetes")
    documents = list(yaml.safe_load_all(found["kubernetes.yaml"]))
    assert all(d["apiVersion"] and d["kind"] and d["metadata"]["name"] for d in documents)
    names = {(d["kind"], d["metadata"]["name"]) for d in documents}
    assert len(names) == len(documents)
    (tmp_path / "cluster.yaml").write_text(
        next(d for d in documents if d["kind"] == "ConfigMap")["data"]["cluster.yaml"]
    )
    pods = [d["spec"]["template"] for d in documents if d["kind"] == "Deployment"]
    services = {d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "Service"}
    for place in read_cluster(tmp_path / "cluster.yaml").places:
        host, port = (place.url or "").removeprefix("http://").split(":")
        spec = services[host]
        assert spec["ports"] == [{"port": int(port)}]
        (pod,) = [p for p in pods if p["metadata"]["labels"] == spec["selector"]]
        (container,) = pod["spec"]["containers"]
        assert {"containerPort": int(port)} in container["ports"]
        assert f"--port {port}" in container["command"][2] and "--host 0.0.0.0" in container["command"][2]
        assert container["env"][0]["valueFrom"]["secretKeyRef"]["name"] == "heliostat-key"
        run = subprocess.run(
            ["/bin/bash", "-n", "-c", container["command"][2]], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        # A container has its own devices only, numbered from 0.
        assert "CUDA_VISIBLE_DEVICES" not in container["command"][2]
    (router,) = [p for p in pods if p["metadata"]["labels"] == {"heliostat": "router"}]
    assert router["spec"]["containers"][0]["startupProbe"]["failureThreshold"] >= 180, "weights take minutes"
    gpu = [p for p in pods if p["spec"].get("nodeSelector", {}).get("kubernetes.io/hostname") == "n1"]
    assert gpu and all(p["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1 for p in gpu)


def test_the_application_of_ray_has_a_deployment_for_each_server(tiny_family: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(made(tiny_family, "ray")["ray.yaml"])
    (application,) = content["applications"]
    (tmp_path / "cluster.yaml").write_text(application["args"]["cluster"])
    places = read_cluster(tmp_path / "cluster.yaml").places
    servers = {server["name"]: server for server in application["args"]["servers"]}
    assert servers.keys() == {place.name for place in places}
    for place in places:
        assert place.url == f"http://{servers[place.name]['address']}:{servers[place.name]['port']}"
        assert settings_of(servers[place.name]["environment"]).worker == place.name


def test_pages_of_several_devices_are_of_all_together(tiny_family: Path) -> None:
    spread = replace(GPU, tensor_parallel=2)
    found = made(tiny_family, "systemd", spread)
    standings = {one.name: one for one in sized(tiny_family, Nodes((spread,), TERMS, "10.0.0.1")).standings}
    for name, text in found.items():
        if name.startswith("n1/"):
            words, one = words_of(text), standings[Path(name).stem.removeprefix("heliostat-")]
            assert int(words[words.index("--kv-cache-memory-bytes") + 1]) == (one.pages_mib << 20) // 2
            assert "CUDA_VISIBLE_DEVICES=0,1" in text
    with pytest.raises(Refused, match="parts of one GPU only"):
        made(tiny_family, "ray", spread)


def test_files_are_for_one_machine(tiny_family: Path) -> None:
    files = Terms(transfer="files", dtype="float32")
    with pytest.raises(Refused, match="say transfer: nixl"):
        made(tiny_family, "systemd", terms=files)
    with pytest.raises(Refused, match="say transfer: nixl"):
        made(tiny_family, "kubernetes", CPU, terms=files)
    assert made(tiny_family, "systemd", CPU, terms=files)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(Refused, match="systemd, kubernetes, ray"):
        rendered("compose", [], "", MEANS)
