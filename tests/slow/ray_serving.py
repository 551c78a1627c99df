"""A program for test_ray.py and a Python that has Ray: deploys a rendered application on one node, says when it is up."""

import sys
from contextlib import suppress
from pathlib import Path

import ray
import yaml
from ray import serve

from heliostat.serve.ray_app import application


def main(path: str, port: int) -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    address = ray.util.get_node_ip_address()
    (found,) = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["applications"]
    for server in found["args"]["servers"]:
        server["address"] = address  # one node plays all
    for _ in range(8):  # Ray waits for its proxy for a minute, and a busy machine may take longer
        with suppress(TimeoutError):
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            break
    serve.run(application(found["args"]), name=found["name"], route_prefix=found["route_prefix"])
    print("UP", flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
