"""``heliostat serve``: what is refused before anything is loaded."""

from pathlib import Path

import pytest

from heliostat.serve.cluster import read
from tests.unit.cli.conftest import Heliostat


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "0.0.0.0"], "--keys FILE"),
        (["--tls-cert", "cert.pem"], "come together"),
        (["--tls-cert", "gone.pem", "--tls-key", "gone.pem"], "gone.pem is not there"),
        (["--keys", "gone.yaml"], "gone.yaml cannot be read"),
        (["--member", "maths"], "did you mean 'math'"),
        (["--device", "tpu"], "torch sees here"),
        (["--cache-mib", "1", "--max-length", "9999999"], "max_length"),
        (["--prefill-workers", "2"], "give both"),
        (["--cluster", "gone.yaml"], "gone.yaml cannot be read"),
        (["--cluster", "gone.yaml", "--decode-workers", "1"], "leave --prefill-workers"),
        (["--print-cluster"], "one process does all"),
        (["--engine", "vlm"], "there is embedded, vllm"),
        (["--engine", "vllm", "--prefill-workers", "1"], "members ask 3 sets of weights of role"),
        (["--cluster", "gone.yaml", "--engine", "vllm"], "leave --engine out"),
    ],
)
def test_what_is_refused(
    heliostat: Heliostat, tiny_family_made: Path, options: list[str], reason: str
) -> None:
    assert reason in heliostat("serve", tiny_family_made, "--port", 0, *options, status=2).stderr


def test_a_folder_without_a_family(heliostat: Heliostat, tmp_path: Path) -> None:
    assert "heliostat init" in heliostat("serve", tmp_path, "--port", 0, status=2).stderr


def test_neither_a_family_nor_a_file_that_names_one(heliostat: Heliostat, tmp_path: Path) -> None:
    assert "give the family's folder" in heliostat("serve", "--port", 0, status=2).stderr
    path = tmp_path / "cluster.yaml"
    path.write_text("workers: [{spawn: embedded}]")
    assert "names no family" in heliostat("serve", "--cluster", path, "--port", 0, status=2).stderr


def test_the_cluster_that_is_printed_can_be_read(
    heliostat: Heliostat, tiny_family_made: Path, tmp_path: Path
) -> None:
    counts = ["--prefill-workers", 2, "--decode-workers", 1]
    path = tmp_path / "cluster.yaml"
    path.write_text(heliostat("serve", tiny_family_made, *counts, "--print-cluster").stdout)
    cluster = read(path)
    assert [place.name for place in cluster.places] == ["prefill-0", "prefill-1", "decode-0"]
    assert heliostat("serve", "--cluster", path, "--print-cluster").stdout == path.read_text()
