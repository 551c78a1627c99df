"""The compiled kernels under the compiler's sanitizers: no access out of bounds, no undefined arithmetic."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from heliostat.ops import native
from heliostat.ops.native import coded, compiling

pytestmark = pytest.mark.slow


CASES = [
    ("kernels", "HELIOSTAT_NATIVE", ("native", "paging", "blocks", "coded_blocks"), native.built),
    ("codebook", "HELIOSTAT_NATIVE_CODEBOOK", ("codebook_kernel", "coded_blocks"), coded.built),
]


@pytest.mark.parametrize(("name", "variable", "files", "runs"), CASES, ids=[case[0] for case in CASES])
def test_sanitizers_find_nothing(
    tmp_path: Path, name: str, variable: str, files: tuple[str, ...], runs: Callable[[], bool]
) -> None:
    if not runs():
        pytest.skip("the compiled kernels do not run here")
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("the sanitizers of g++ are used")
    library = tmp_path / f"{name}.so"
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
        variable: str(library),
    }
    tests = [f"tests/unit/ops/test_{file}.py" for file in files]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not gpus", *tests]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
