"""Compiles kernels.cpp into kernels.so beside it: run by the build, or by hand. Nothing but the standard library."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
SOURCE, LIBRARY = HERE / "kernels.cpp", HERE / "kernels.so"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mavx512bf16",
    "-mfma",
]


def build(out: Path = LIBRARY, *, extra: Sequence[str] = ()) -> str | None:
    """Compile into ``out``, whole or not at all; None if that worked, else why not. ``extra``: more flags."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler found (g++ or clang++; CXX names another)"
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    compiled = partial.with_suffix(".o")
    steps = (
        [compiler, *FLAGS, *extra, "-c", str(SOURCE), "-o", str(compiled)],
        # Not linked to an OpenMP: the one that torch brings is used, so that there is one set of threads.
        [compiler, "-shared", *extra, str(compiled), "-o", str(partial)],
    )
    try:
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                return f"{' '.join(step)} failed:\n{done.stderr[-2000:]}"
        partial.replace(out)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        compiled.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
    return None


if __name__ == "__main__":
    sys.exit(build())
