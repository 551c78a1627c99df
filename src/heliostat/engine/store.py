"""Where pages lie so that other processes of this machine can read them: memory with a name. No torch.

A page is ``slices`` pieces of bytes, one for the keys and one for the values of each layer, and a tail: the sums of its
values of all layers, where attention needs them. Beside the pages stand
their generations: whoever writes a page raises its generation first, so a reader that finds it unchanged after
copying has read what it was promised. A digest of the bytes is checked all the same.

Nobody writes into another's memory: who needs pages fetches them, when it likes, into pages that it holds itself.
So there is no late writer that could meet a page which has another owner by now.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from heliostat.engine.page_table import Generations
from heliostat.errors import Refused

MIB = 2**20
_HEADER = struct.Struct("<8s32sQQQQ")
_MAGIC = b"heliopg2"
_ROOM = 4096  # bytes of the header; what follows is aligned


class Gone(Exception):
    """Pages are not there, or are not what was promised."""


@dataclass(frozen=True, slots=True)
class Form:
    """How many pages there are and how each is cut."""

    pages: int
    slices: int
    slice_bytes: int
    tail_bytes: int = 0

    @property
    def page_bytes(self) -> int:
        return self.slices * self.slice_bytes + self.tail_bytes

    @property
    def start(self) -> int:
        """Where the first page begins, bytes: behind the generations."""
        return _ROOM + -(-self.pages * 8 // _ROOM) * _ROOM

    @property
    def size(self) -> int:
        """Bytes of all."""
        return self.start + self.pages * self.page_bytes


@dataclass(slots=True, eq=False)
class Store:
    """One worker's memory for pages, by ``make``; or another's, to read, by ``look``."""

    name: str
    incarnation: str
    form: Form
    generations: Generations
    """[P] of 8 bytes."""
    content: memoryview
    """Bytes of all pages: slice n of page p begins at (n * P + p) * slice_bytes; behind all slices lie the tails."""
    _file: int
    _known: dict[int, tuple[int, bytes]] = field(default_factory=dict)

    @classmethod
    def make(cls, name: str, incarnation: str, form: Form) -> Store:
        """Memory of this process, zeroed; it is held as long as the process lives. Refused where there is none."""
        path = _path(name)
        try:
            file = _held(path)
        except OSError as error:
            raise Refused(f"no memory for pages under the name {name!r}: {error.strerror}") from error
        try:
            _allocate(file, form, path.parent)
            memory = mmap.mmap(file, form.size)
        except BaseException:
            path.unlink()
            os.close(file)
            raise
        counts = (form.pages, form.slices, form.slice_bytes, form.tail_bytes)
        memory[: _HEADER.size] = _HEADER.pack(_MAGIC, incarnation.encode(), *counts)
        return cls(name, incarnation, form, *_parts(memoryview(memory), form), file)

    @classmethod
    def look(cls, name: str) -> Store:
        """Another's memory, read only. Raises Gone where there is none of that name."""
        try:
            file = os.open(_path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise Gone(f"the memory of its pages is not there: {error.strerror}") from error
        try:
            form, incarnation = _read_header(file)
            memory = mmap.mmap(file, form.size, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(file)
            raise
        return cls(name, incarnation, form, *_parts(memoryview(memory), form), file)

    def slices(self, page: int) -> Iterator[memoryview]:
        """The pieces of a page."""
        size, form = self.form.slice_bytes, self.form
        for number in range(form.slices):
            start = (number * form.pages + page) * size
            yield self.content[start : start + size]
        if tail := form.tail_bytes:
            start = form.slices * form.pages * size + page * tail
            yield self.content[start : start + tail]

    def digest(self, page: int) -> bytes:
        """SHA-256 of a page's bytes, as they are now."""
        found = hashlib.sha256()
        for piece in self.slices(page):
            found.update(piece)
        return found.digest()

    def digest_of_full(self, page: int) -> bytes:
        """The same for a page that nobody writes any more: read once as long as it is not given out again."""
        generation, digest = self._known.get(page, (-1, b""))
        if generation != self.generations[page]:
            digest = self.digest(page)
            self._known[page] = (self.generations[page], digest)
        return digest

    def copy(self, page: int, own: Store, target: int) -> None:
        """Bytes of a page of this memory into page ``target`` of one's own."""
        for source, place in zip(self.slices(page), own.slices(target), strict=True):
            place[:] = source

    @property
    def alive(self) -> bool:
        """Whether it still has its name."""
        return os.fstat(self._file).st_nlink > 0

    def close(self, *, remove: bool = False) -> None:
        """Give the file up; the memory goes with its last reader. ``remove``: nobody shall find it any more."""
        if remove:
            with suppress(FileNotFoundError):
                _path(self.name).unlink()
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


@dataclass(slots=True)
class Shelves:
    """Other workers' memories, opened once each while they have their names."""

    open: Callable[[str], Store] = Store.look
    _open: dict[str, Store] = field(default_factory=dict)

    def look(self, name: str) -> Store:
        """Raises Gone where there is none."""
        found = self._open.get(name)
        if found is None:
            self.tidy()
            found = self._open[name] = self.open(name)
        return found

    def tidy(self) -> None:
        """Give up those of the dead: while they are open here, their memory is nobody else's."""
        for old in [store for store in self._open.values() if not store.alive]:
            self._open.pop(old.name).close()


@dataclass(frozen=True, slots=True)
class Promise:
    """Pages of another worker, as it described them."""

    store: str
    incarnation: str
    pages: Sequence[int]
    generations: Sequence[int]
    digests: Sequence[bytes]


@dataclass(slots=True)
class Fetch:
    """Brings promised pages in, one by one."""

    source: Store
    own: Store
    promise: Promise
    bytes: int = 0
    """Brought in so far; who calls may note in how many ``seconds``."""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Raises Gone where the memory is of another life, or cut otherwise."""
        form, own = self.source.form, self.own.form
        if self.source.incarnation != self.promise.incarnation:
            raise Gone("its pages were of an earlier life of that worker")
        if replace(form, pages=own.pages) != own:
            raise Gone(f"its pages have {form.page_bytes} bytes, those here {own.page_bytes}")
        if not all(0 <= page < form.pages for page in self.promise.pages):
            raise Gone(f"its pages are none of the {form.pages} there")

    def bring(self, index: int, target: int) -> None:
        """Copy promised page ``index`` into one's own page ``target``. Raises Gone where it is not what was promised.

        What is in ``target`` then means nothing.
        """
        page, promise = self.promise.pages[index], self.promise
        self._fence(page, promise.generations[index])
        self.source.copy(page, self.own, target)
        self._fence(page, promise.generations[index])
        if self.own.digest(target) != promise.digests[index]:
            raise Gone("a page arrived damaged")
        self.bytes += self.own.form.page_bytes

    def _fence(self, page: int, generation: int) -> None:
        if self.source.generations[page] != generation:
            raise Gone("a page was given to somebody else before it was fetched")


def sweep(prefix: str) -> list[str]:
    """Remove memories whose names begin so and which no living process holds; returns their names."""
    found = []
    for path in sorted(_folder().glob(f"{prefix}*")):
        with suppress(OSError):
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                found.append(path.name)
            finally:
                os.close(file)
    return found


def _folder() -> Path:
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else Path(tempfile.gettempdir())


def _path(name: str) -> Path:
    if not name or not all(sign.isalnum() or sign in "-_." for sign in name) or name.startswith("."):
        raise Gone(f"{name!r} is no name of a memory")
    return _folder() / name


def _held(path: Path) -> int:
    """A new file that this process holds and that has its name; a sweep may come before one is held."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return file
        os.close(file)


def _allocate(file: int, form: Form, folder: Path) -> None:
    """All of it now: later there would be no way to say that there is too little."""
    try:
        os.ftruncate(file, form.size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, form.size)
    except OSError as error:
        room = os.statvfs(folder)
        free = room.f_bavail * room.f_frsize // MIB
        raise Refused(
            f"{form.pages} pages for other workers to read take {form.size // MIB} MiB of shared memory and {folder} "
            f"has {free}: give the workers less cache memory, or mount {folder} with more ({error.strerror})"
        ) from error


def _read_header(file: int) -> tuple[Form, str]:
    found = os.pread(file, _HEADER.size, 0)
    if len(found) < _HEADER.size:
        raise Gone("the memory of its pages is cut short")
    magic, incarnation, *counts = _HEADER.unpack(found)
    form = Form(*counts)
    if magic != _MAGIC or os.fstat(file).st_size < form.size:
        raise Gone("the memory of its pages is none of ours, or cut short")
    return form, incarnation.rstrip(b"\0").decode("ascii", "replace")


def _parts(memory: memoryview, form: Form) -> tuple[memoryview, memoryview]:
    generations = memory[_ROOM : _ROOM + form.pages * 8].cast("Q")
    return generations, memory[form.start : form.start + form.pages * form.page_bytes]
