"""Which versions of vLLM the plug-ins were made for, and one clear message for the others. No torch, no vLLM."""

from __future__ import annotations

import re

from heliostat.errors import Refused

FIRST, LAST = (0, 26), (0, 32)
"""From the first to the last one, both counted, patches of either included. Tested is the last."""


def refuse_unsupported(version: str) -> None:
    """Raise Refused for a version of vLLM outside the range."""
    if (found := numbers(version)) is None or not FIRST <= found <= LAST:
        raise Refused(
            f"this is vLLM {version}; heliostat's plug-ins know {_shown(FIRST)} to {_shown(LAST)}: install one of those, or "
            "serve with the embedded engine (heliostat serve, without --engine vllm)"
        )


def refuse_missing(version: str, missing: list[str]) -> None:
    """Raise Refused where parts of vLLM that the plug-ins stand on are not where they were."""
    if missing:
        raise Refused(
            f"vLLM {version} lacks what heliostat's plug-ins need: {', '.join(missing)}; install vLLM {_shown(LAST)}, or "
            "serve with the embedded engine (heliostat serve, without --engine vllm)"
        )


def numbers(version: str) -> tuple[int, int] | None:
    """(major, minor) of a version as vLLM writes it (``0.32.0+cpu``); None where it is none."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else None


def _shown(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
