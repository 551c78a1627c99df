"""``heliostat serve``: what is refused before anything is loaded."""

from pathlib import Path

import pytest

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
    ],
)
def test_what_is_refused(
    heliostat: Heliostat, tiny_family_made: Path, options: list[str], reason: str
) -> None:
    assert reason in heliostat("serve", tiny_family_made, "--port", 0, *options, status=2).stderr


def test_a_folder_without_a_family(heliostat: Heliostat, tmp_path: Path) -> None:
    assert "heliostat init" in heliostat("serve", tmp_path, "--port", 0, status=2).stderr
