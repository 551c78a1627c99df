"""The compiled kernels under the compiler's sanitizers: no access out of bounds, no undefined arithmetic."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from heliostat.ops import native
from heliostat.ops.native import compiling

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not native.built(), reason="the compiled kernels do not run here")
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("the sanitizers of g++ are used")
    library = tmp_path / "kernels.so"
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1")
    assert compiling.build(library, extra=flags) is None
    runtimes = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = os.environ | {
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "HELIOSTAT_NATIVE": str(library),
    }
    tests = [f"tests/unit/ops/test_{name}.py" for name in ("native", "paging", "blocks")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
