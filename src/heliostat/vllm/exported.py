"""What an exported module's files are, noted beside them, and whether they still are that. No torch, no vLLM.

Copies of a family lie on many machines, and may be half of one export and half of another: a server says whose weights it
holds only after it has looked.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from heliostat.errors import Refused
from heliostat.files import atomic_write_text, read_json

NOTE = "heliostat-files.json"
"""``{"digest": the module's, "files": {name: SHA-256 in hex}}``."""


def note(folder: Path, digest: str) -> None:
    """Write down what the files in a folder are."""
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.name != NOTE}
    atomic_write_text(folder / NOTE, json.dumps({"digest": digest, "files": files}, indent=1) + "\n")


def changed(folder: Path, digest: str) -> str:
    """What of an export is not as it was written for this module; empty where all is."""
    try:
        noted = read_json(folder / NOTE)
    except (OSError, Refused):
        return f"{NOTE} is not there"
    if noted.get("digest") != digest:
        return f"it is of digest {str(noted.get('digest'))[:12]}, not {digest[:12]}"
    for name, wanted in noted.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            return f"{name} is not there"
        if _sha256(path) != wanted:
            return f"{name} is not what was written"
    return ""


def refuse_changed(folder: Path, digest: str) -> None:
    """Raise Refused for an export that is not, file by file, what was written for this module."""
    if why := changed(folder, digest):
        raise Refused(
            f"{folder} is not the export of the module of digest {digest[:12]} ({why}): copy the family with its exports "
            "again, or remove the folder, so that it is written anew"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
