"""Compiles kernels.cpp and codebook.cpp into libraries beside them: run by the build, or by hand. Standard library only."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
LIBRARY, CODEBOOK = HERE / "kernels.so", HERE / "codebook.so"
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
MORE = {"codebook": ["-mavx512vbmi", "-mavx512vnni"]}
"""Flags of one library alone, by the name of its source: what it uses and not every such processor has."""


def build(out: Path = LIBRARY, *, extra: Sequence[str] = ()) -> str | None:
    """Compile the source of ``out``'s name into it, whole or not at all; None if that worked, else why not.

    ``extra``: more flags.
    """
    source = HERE / f"{out.stem}.cpp"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler found (g++ or clang++; CXX names another)"
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    compiled = partial.with_suffix(".o")
    steps = (
        [compiler, *FLAGS, *MORE.get(out.stem, []), *extra, "-c", str(source), "-o", str(compiled)],
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
    sys.exit(build(LIBRARY) or build(CODEBOOK))
