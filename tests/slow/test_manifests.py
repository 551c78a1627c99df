"""What is rendered for Kubernetes, held to its own schemas: no unknown field, no wrong type, nothing missing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.serve.rendered import CPU, GPU, MEANS, made

pytestmark = pytest.mark.slow
schemas: Any = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")


def test_manifests_fit_the_schemas_of_kubernetes(tiny_family: Path) -> None:
    means = replace(MEANS, hosts=("llm.example",))
    for nodes in ((), (CPU,), (replace(GPU, devices=1),), (replace(GPU, tensor_parallel=2),)):
        found = made(tiny_family, "kubernetes", *nodes, means=means)["kubernetes.yaml"]
        for document in yaml.safe_load_all(found):
            for version in ("1.25", "1.37"):
                schemas.validate(document, version, strict=True)


def test_the_schemas_would_find_it(tiny_family: Path) -> None:
    *_, deployment, _ = yaml.safe_load_all(made(tiny_family, "kubernetes")["kubernetes.yaml"])
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    container["livenesProbe"] = container.pop("livenessProbe")
    with pytest.raises(schemas.ValidationError, match="livenesProbe"):
        schemas.validate(deployment, "1.37", strict=True)
