"""Machines: read, refused, filled with servers; and the texts that start these, as others parse them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from heliostat.errors import Refused
from heliostat.serve.nodes import LEAST_PAGES_MIB, OVERHEAD_MIB, Node, placed, read

GIB = 1024


def node(name: str, **more: Any) -> Node:
    return Node(**{"name": name, "address": f"10.0.0.{len(name)}", "memory": 80 * GIB, **more})


WANTED: Any = {
    "prefill": {(f"m{n}", False): (f"m{n}",) for n in range(4)},
    "decode": {("base", False): ("base", "a", "b")},
}
SIZES = {**{f"m{n}": 16 * GIB for n in range(4)}, "base": 16 * GIB, "a": 100, "b": 100}


def test_every_set_of_weights_has_a_place_and_no_device_is_idle() -> None:
    found = placed([node("n", devices=8)], WANTED, SIZES)
    assert len(found) == 8, "a server on every GPU"
    assert {one.group[0] for one in found if one.role == "prefill"} == {"m0", "m1", "m2", "m3"}
    assert len({one.port for one in found}) == 8 and len({one.devices for one in found}) == 8
    assert len({one.name for one in found}) == 8


def test_servers_stand_side_by_side_where_devices_are_few() -> None:
    found = placed([node("n", devices=2)], WANTED, SIZES)
    assert len(found) == 5 and {one.beside for one in found} == {2, 3}
    for device in {one.devices for one in found}:
        here = [one for one in found if one.devices == device]
        taken = sum(one.weights_mib + one.pages_mib + OVERHEAD_MIB for one in here)
        assert taken <= here[0].node.room and all(one.pages_mib >= LEAST_PAGES_MIB for one in here)
        assert sum(one.share for one in here) <= 0.91


def test_adapters_stand_on_one_base() -> None:
    (base,) = [one for one in placed([node("n", devices=2)], WANTED, SIZES) if one.role == "decode"]
    assert base.modules == ("base", "a", "b") and base.weights_mib == 16 * GIB + 200


def test_a_server_spread_over_devices_has_their_memory_together() -> None:
    found = placed(
        [node("n", devices=8, tensor_parallel=4)],
        {"decode": {("base", False): ("base",)}},
        {"base": 140 * GIB},
    )
    assert [one.devices for one in found] == [(0, 1, 2, 3), (4, 5, 6, 7)]


def test_what_has_no_room_is_refused_with_the_numbers() -> None:
    with pytest.raises(Refused, match="takes 100608 MiB .* n 73728 MiB.*tensor_parallel"):
        placed([node("n")], {"decode": {("base", False): ("base",)}}, {"base": 96 * GIB})
    with pytest.raises(Refused, match="no node with role decode"):
        placed([node("n", roles=("prefill",))], {"decode": {("base", False): ("base",)}}, {"base": 1})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"nodes": []}, "must be a list"),
        ({"nodes": [{"name": "n", "address": "x"}]}, "memory is missing"),
        (
            {"nodes": [{"name": "n", "address": "x", "memory": 1, "roles": ["decod"]}]},
            "allowed are prefill, decode",
        ),
        ({"nodes": [{"name": "n", "address": "x", "memory": 1, "gpus": 2}]}, "'gpus'"),
        (
            {"nodes": [{"name": "n", "address": "x", "memory": 1, "device": "tpu"}]},
            "'tpu'; allowed are cuda, cpu",
        ),
        ({"nodes": [{"name": "n", "address": "x", "memory": 1, "tensor_parallel": 2}]}, "it has 1 devices"),
        ({"nodes": [{"name": "n", "address": "x", "memory": 1}] * 2}, "two nodes are called 'n'"),
    ],
)
def test_wrong_files_are_refused_with_the_place(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "nodes.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(Refused, match=words) as refused:
        read(path)
    assert str(path) in str(refused.value)


def test_nodes_speak_over_the_network_and_with_a_key_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "nodes.yaml"
    path.write_text("nodes: [{name: n, address: 10.0.0.1, memory: 1000, device: cpu, devices: 4}]")
    found = read(path)
    assert (found.terms.transfer, found.terms.key_env, found.router) == ("nixl", "VLLM_API_KEY", "10.0.0.1")
    assert found.nodes[0].slots == ((0, 1, 2, 3),)
