"""``heliostat cluster``: what fits where is shown, and texts are printed or written."""

from pathlib import Path

import pytest
import yaml

from tests.unit.cli.conftest import Heliostat


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One GPU machine and one without; who writes texts need not have the servers' key."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    path = tmp_path / "nodes.yaml"
    machines = [
        {"name": "n1", "address": "10.0.0.1", "devices": 2, "memory": 40960},
        {"name": "n2", "address": "10.0.0.2", "device": "cpu", "devices": 8, "memory": 65536},
    ]
    path.write_text(yaml.safe_dump({"nodes": machines}))
    return path


def test_what_fits_where_is_shown(heliostat: Heliostat, tiny_family_made: Path, nodes: Path) -> None:
    shown = heliostat("cluster", "size", tiny_family_made, "--nodes", nodes).stdout
    assert "prefill-0" in shown and "decode-0" in shown and "n1" in shown and "two streams" in shown


def test_texts_are_written_into_a_folder(
    heliostat: Heliostat, tiny_family: Path, nodes: Path, tmp_path: Path
) -> None:
    words = ["cluster", "render", tiny_family, "--nodes", nodes, "--at", "/srv/fam"]
    heliostat(*words, "--format", "systemd", "--out", tmp_path / "deploy")
    assert (tmp_path / "deploy" / "cluster.yaml").is_file()
    assert (tmp_path / "deploy" / "router" / "heliostat-router.service").is_file()
    told = heliostat(*words, "--format", "kubernetes").stdout
    assert "# ---- kubernetes.yaml" in told and "/srv/fam/exports/vllm/" in told


def test_unknown_formats_and_missing_files_are_refused(
    heliostat: Heliostat, tiny_family: Path, nodes: Path
) -> None:
    words = ["cluster", "render", tiny_family, "--format", "compose", "--nodes"]
    assert "systemd, kubernetes, ray" in heliostat(*words, nodes, status=2).stderr
    assert "gone.yaml" in heliostat(*words, "gone.yaml", status=2).stderr
