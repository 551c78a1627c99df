"""What starts servers elsewhere does what it should: shells run, probes ask, units and pods say what they must."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat.errors import Refused
from heliostat.serve.render import Means
from tests.unit.serve.rendered import CPU, GPU, MEANS, containers, made


def several(folder: Path, python: Path | str) -> Any:
    """A container with several servers: they share a GPU."""
    means = replace(MEANS, python=str(python))
    found = made(folder, "kubernetes", replace(GPU, devices=1), means=means)["kubernetes.yaml"]
    container, _ = containers(found)
    assert len(container["ports"]) > 1
    return container


SERVER = """#!/bin/bash
trap 'echo >> {0}/ended; exit 0' TERM
echo $$ >> {0}/begun
while :; do sleep 0.02; done
"""


@contextmanager
def running(folder: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """The shell of a container with several servers, and these servers' process ids; all end with the block."""
    server, begun = tmp_path / "server", tmp_path / "begun"
    server.write_text(SERVER.format(tmp_path))
    server.chmod(0o755)
    begun.touch()
    container, pids = several(folder, server), list[int]()
    with subprocess.Popen(container["command"], start_new_session=True) as process:
        try:
            while len(pids) < len(container["ports"]):
                assert process.poll() is None
                time.sleep(0.01)
                pids = [int(word) for word in begun.read_text().split()]
            yield process, pids
        finally:  # in a container they end with its first process
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def test_servers_of_one_container_end_in_good_order(tiny_family: Path, tmp_path: Path) -> None:
    with running(tiny_family, tmp_path) as (process, pids):
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
        ended = (tmp_path / "ended").read_text().splitlines()
        assert len(ended) == len(pids), "each heard it, and was waited for"


def test_a_container_ends_with_the_first_of_its_servers(tiny_family: Path, tmp_path: Path) -> None:
    with running(tiny_family, tmp_path) as (process, pids):
        os.kill(pids[0], signal.SIGKILL)
        assert process.wait() == 128 + signal.SIGKILL


def test_all_servers_of_a_container_are_looked_at(tiny_family: Path) -> None:
    container = several(tiny_family, sys.executable)
    ports = [str(port["containerPort"]) for port in container["ports"]]
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        words = container[kind]["exec"]["command"][:3]
        assert container[kind]["exec"]["command"][3:] == ports
    well, ill = listening(200), listening(503)
    try:
        asked = [f"{server.server_address[1]}" for server in (well, ill)]
        for given, status in (([asked[0]] * 2, 0), (asked, 1)):
            assert subprocess.run([*words, *given], capture_output=True).returncode == status
    finally:
        for server in (well, ill):
            server.shutdown()
            server.server_close()


def listening(status: int) -> HTTPServer:
    """Answers ``/health`` with a status, on a thread."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_server_that_hangs_is_started_again_and_one_that_loads_is_not(tiny_family: Path) -> None:
    for container in containers(made(tiny_family, "kubernetes")["kubernetes.yaml"]):
        startup, liveness = container["startupProbe"], container["livenessProbe"]
        assert startup["failureThreshold"] * startup["periodSeconds"] >= 1800, "loading takes minutes"
        assert liveness["periodSeconds"] >= 10


def test_pods_on_processors_say_what_they_take(tiny_family: Path) -> None:
    found = made(tiny_family, "kubernetes", CPU)["kubernetes.yaml"]
    server, _ = containers(found)
    assert server["resources"] == {
        "requests": {"cpu": 4, "memory": "65536Mi"},
        "limits": {"memory": "65536Mi"},
    }
    deployment = next(d for d in yaml.safe_load_all(found) if d["kind"] == "Deployment")
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    (shm,) = [volume for volume in volumes if volume["name"] == "shm"]
    assert shm["emptyDir"]["sizeLimit"] == f"{2048 * len(server['ports'])}Mi"


def test_dollars_and_percents_mean_nothing_in_units(tiny_family: Path) -> None:
    unit = next(
        text
        for name, text in made(tiny_family, "systemd", means=replace(MEANS, family="/srv/$a %h")).items()
        if name.startswith("n1/")
    )
    assert 'serve "/srv/$$a %%h/exports' in unit
    (settings,) = [line for line in unit.splitlines() if line.startswith('Environment="HELIOSTAT_WORKER=')]
    assert "$$" not in settings


def test_units_run_as_a_user_of_their_own(tiny_family: Path) -> None:
    for name, text in made(tiny_family, "systemd").items():
        if name.endswith(".service"):
            assert "\nUser=heliostat\n" in text and "\nEnvironment=HOME=%C/heliostat\n" in text
            assert "\nCacheDirectory=heliostat\n" in text


def test_paths_on_the_nodes_are_whole() -> None:
    with pytest.raises(Refused, match="--at srv/fam"):
        Means(family="srv/fam", python="python3")
