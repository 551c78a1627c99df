"""The files of an export by their digests: written beside them, compared before anything is loaded. No torch, no vLLM.

A folder's name is no proof: copies of it may be cut short, or mixed with another's of the same shapes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from heliostat.errors import Refused
from heliostat.files import atomic_write_text, read_json

SEAL = "digests.json"
"""In the folder: digest of the module that it holds, and SHA-256 of every other file."""
AGAIN = "export the family again (heliostat serve and heliostat cluster render do), and copy it whole"


def seal(folder: Path, module: str) -> None:
    """Write down what the files are, of a module with this digest (hex)."""
    files = {name: _digest(folder / name) for name in _names(folder)}
    atomic_write_text(folder / SEAL, json.dumps({"module": module, "files": files}, indent=2) + "\n")


def refuse_other(folder: Path, module: str) -> None:
    """Raise Refused unless exactly the files that were sealed for this module are there. Reads every byte."""
    said = read_json(folder / SEAL)
    if said.get("module") != module:
        raise Refused(
            f"{folder} holds a module of digest {str(said.get('module'))[:12]}, not {module[:12]}: {AGAIN}"
        )
    files = said.get("files")
    files = files if isinstance(files, dict) else {}
    if odd := sorted(set(files) ^ set(_names(folder))):
        raise Refused(
            f"{folder}: files are missing, or are there and were not exported: {', '.join(odd)}; {AGAIN}"
        )
    for name, digest in files.items():
        if (found := _digest(folder / name)) != digest:
            raise Refused(
                f"{folder / name} is not what was exported: its digest is {found[:12]}, {SEAL} says "
                f"{str(digest)[:12]}; {AGAIN}"
            )


def _names(folder: Path) -> list[str]:
    """Of files that somebody may load."""
    return sorted(
        file.name for file in folder.iterdir() if file.name != SEAL and not file.name.startswith(".")
    )


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"{file} cannot be read: {error.strerror}") from error
