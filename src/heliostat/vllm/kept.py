"""Keys and values of read prompts, kept as files in memory until another process of this machine has loaded them.

A file holds whole pages of every layer, as they lie in the cache, and says what they are: who wrote them, of which
tokens, in which layout, with a digest of the bytes. Whoever loads compares all of it. Knows no vLLM.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from heliostat.errors import Refused

HANDLE = re.compile(r"[A-Za-z0-9]{1,64}-[0-9a-f]{32}")
FORMAT = "1"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Label:
    """What a file's pages are. Two are equal exactly when the pages may stand for each other."""

    writer: str
    tokens: int
    ids: str
    """``wire.tokens_digest`` of these tokens."""
    fit: str
    layout: str
    """Shape of a page in every layer, number format, processor."""
    part: str
    """Which of how many shares of the heads: ``0/1``."""

    def to_metadata(self) -> dict[str, str]:
        """Texts, as safetensors keeps them."""
        return {"format": FORMAT, **{key: str(getattr(self, key)) for key in self.__dataclass_fields__}}

    def difference(self, found: Mapping[str, str]) -> str:
        """In what a file's metadata differs; empty where in nothing. What is empty here is not asked for."""
        own = self.to_metadata()
        return ", ".join(key for key, value in own.items() if value and found.get(key) != value)


def private_folder(folder: str) -> Path:
    """``folder``, with this user's number at its end: made if need be. Refused where others could look into it."""
    path = Path(f"{folder}-{os.getuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise Refused(f"{path} must be a folder of this user that nobody else can enter (mode 700)")
    return path


@dataclass(frozen=True, slots=True)
class Cache:
    """The cache of one layer: pages along ``dim``, each in ``split`` pieces.

    A page is copied whole: what lies inside it, and how, is the kernels' own affair.
    """

    tensor: Tensor
    dim: int
    split: int

    @classmethod
    def of(cls, name: str, tensor: Tensor, pages: int) -> Cache:
        """Find out where the pages are. Refused for a cache that does not look like pages."""
        for dim in (0, 1):
            if tensor.dim() > dim + 1 and tensor.shape[dim] >= pages and tensor.shape[dim] % pages == 0:
                return cls(tensor, dim, tensor.shape[dim] // pages)
        raise Refused(f"the cache of {name} has shape {tuple(tensor.shape)}, which is not {pages} pages")

    @property
    def facts(self) -> list[Any]:
        """Shape of a page, number format."""
        shape = list(self.tensor.shape)
        shape[self.dim] = self.split
        return [shape, self.dim, str(self.tensor.dtype)]

    def _rows(self, pages: list[int]) -> Tensor:
        rows = torch.tensor(pages, device=self.tensor.device)[:, None] * self.split
        return (rows + torch.arange(self.split, device=self.tensor.device)).reshape(-1)

    def take(self, pages: list[int]) -> Tensor:
        """Copy of these pages on the processor, pages first."""
        taken = self.tensor.index_select(self.dim, self._rows(pages)).cpu()
        return taken.movedim(self.dim, 0).contiguous()

    def put(self, pages: list[int], values: Tensor) -> None:
        """Write pages, laid out as ``take`` gave them."""
        rows = self._rows(pages)
        given = values.reshape(-1, *values.shape[1:])[: len(rows)]
        if len(given) != len(rows):
            raise Refused(f"{len(rows)} pieces of pages should be loaded, there are {len(given)}")
        self.tensor.index_copy_(self.dim, rows, given.movedim(0, self.dim).to(self.tensor.device))


@dataclass(slots=True)
class Shelf:
    """The files of one process (``own``: its incarnation), in a folder that it shares with others."""

    folder: Path
    own: str
    keep_bytes: int
    lease: float
    _lock: int | None = field(default=None, repr=False)

    def open(self) -> Shelf:
        """Hold the lock that says that this process lives, and remove what dead ones left."""
        path, new = self.folder / f"{self.own}.lock", self.folder / f"{self.own}.new"
        self._lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(path)  # only now do others see it: nobody finds it without its holder
        for lock in self.folder.glob("*.lock"):
            if lock != path and _dead(lock):
                _remove(self.folder, lock.stem)
                lock.unlink(missing_ok=True)
        return self

    def close(self) -> None:
        """Remove all that is kept."""
        _remove(self.folder, self.own)
        if self._lock is not None:
            (self.folder / f"{self.own}.lock").unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def write(self, handle: str, label: Label, pages: Mapping[str, Tensor]) -> None:
        """Keep pages (of each layer, on the processor) under ``handle``. Refused where there is no room for them."""
        self.sweep()
        size = sum(tensor.numel() * tensor.element_size() for tensor in pages.values())
        held = sum(map(_size, self.folder.glob(f"{self.own}-*.pages")))
        if held + size > self.keep_bytes:
            raise Refused(
                f"{size / MIB:.1f} MiB of keys and values should be kept, {held / MIB:.1f} MiB are kept already, and at "
                f"most {self.keep_bytes / MIB:.0f} MiB may be"
            )
        path = file_of(self.folder, handle, label.part)
        partial = path.with_suffix(".partial")
        try:
            save_file(dict(pages), partial, {**label.to_metadata(), "sha256": digest(pages)})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise Refused(f"keys and values could not be kept: {error}") from error

    def refuse(self, handle: str, reason: str) -> None:
        """Say why nothing is kept under ``handle``."""
        (self.folder / f"{handle}.no").write_text(reason, encoding="utf-8")

    def sweep(self) -> None:
        """Remove what nobody fetched within the lease."""
        oldest = time.time() - self.lease
        for file in self.folder.glob(f"{self.own}-*"):
            try:
                if file.stat().st_mtime < oldest:
                    file.unlink()
            except FileNotFoundError:
                continue


def file_of(folder: Path, handle: str, part: str = "0/1") -> Path:
    """Where a share of what is kept lies. Refused for a handle that is none."""
    if not HANDLE.fullmatch(handle):
        raise Refused("what should be loaded has no proper handle")
    return folder / f"{handle}.{part.replace('/', 'of')}.pages"


def check(folder: Path, handle: str, label: Label) -> None:
    """Refused where nothing is kept under ``handle``, or something else than ``label``. Reads the file's head only."""
    try:
        with safe_open(file_of(folder, handle, label.part), framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise Refused(
            "what should be loaded is not there (any more): it was fetched, its lease was over, or its worker ended"
        ) from error
    if difference := label.difference(metadata):
        raise Refused(f"what should be loaded is not what was kept; what differs: {difference}")


def check_any(folder: Path, handle: str, label: Label) -> None:
    """``check`` by whoever does not know in how many shares it lies: of the first of them."""
    file_of(folder, handle)
    files = sorted(folder.glob(f"{handle}.0of*.pages"))
    part = files[0].name.split(".")[-2].replace("of", "/") if files else "0/1"
    check(folder, handle, replace(label, part=part))


def read(folder: Path, handle: str, label: Label) -> dict[str, Tensor]:
    """The pages of every layer. Refused where they are not there, are something else, or are damaged."""
    check(folder, handle, label)
    try:
        with safe_open(file_of(folder, handle, label.part), framework="pt") as file:
            pages = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            said = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise Refused("what should be loaded is gone, or damaged") from error
    if digest(pages) != said:
        raise Refused("what should be loaded is damaged: its digest is not what was written")
    return pages


def refusal(folder: Path, handle: str) -> str:
    """Why nothing is kept under ``handle``; empty where something is, or nobody said why."""
    file = folder / f"{handle}.no"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def release(folder: Path, handle: str) -> None:
    """What is kept under ``handle`` is needed no more."""
    if HANDLE.fullmatch(handle):
        for file in folder.glob(f"{handle}.*"):
            file.unlink(missing_ok=True)


def digest(pages: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, formats, shapes and bytes."""
    found = hashlib.sha256()
    for name in sorted(pages):
        tensor = pages[name].contiguous()
        found.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _size(file: Path) -> int:
    """Bytes; none of one that others have just removed."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def _dead(lock: Path) -> bool:
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _remove(folder: Path, own: str) -> None:
    for file in folder.glob(f"{own}-*"):
        file.unlink(missing_ok=True)
