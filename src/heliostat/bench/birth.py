"""A number's birth certificate: hardware, versions, commit, command, date."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any


def certificate(command: str, **more: Any) -> dict[str, Any]:
    """Facts that belong beside every measured number; ``more`` is added (seeds, repetitions).

    ``threads`` are torch's; None where it is not loaded, as in a client.
    """
    torch: Any = sys.modules.get("torch")
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "hardware": _hardware(),
        "threads": torch.get_num_threads() if torch else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("heliostat", "torch", "transformers")},
        **more,
    }


def _commit() -> str:
    """The commit of the source tree, with a mark where it was changed since; 'unknown' outside a checkout."""
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        return f"{head}+changes" if _git(here, "status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()


def _hardware() -> str:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = models[0] if models else name
    torch: Any = sys.modules.get("torch")
    gpu = f", {torch.cuda.get_device_name(0)}" if torch and torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores {name}{gpu}"
