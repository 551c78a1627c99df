"""Files that are written whole or not at all: atomic files and folders, locks, JSON, YAML.

What is being written lies in ``<name>.partial-<process>-<thread>`` beside its target until it is complete and
on the disk; then one rename puts it in place. What a process that died left there is swept away by the next
writer of the same name. Process ids are those of one machine: two machines must not write into one folder at
the same time.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from heliostat.errors import Refused

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


def atomic_write_text(path: str | Path, text: str) -> None:
    """Replace the file by ``text`` in UTF-8; see ``atomic_write_bytes``."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Replace the file by ``data``: a reader, even after a crash, sees all the old or all the new bytes.

    Raises Refused where the disk is full or may not be written; the old file stays as it was.
    """
    with saving(path, needed=len(data)) as partial:
        partial.write_bytes(data)


@contextmanager
def saving(path: str | Path, *, needed: int | None = None) -> Iterator[Path]:
    """A path to write one file to; if the block ends well it replaces ``path``, else nothing changes.

    ``needed`` is the size in bytes, where known, for the message if the disk is full.
    """
    path = Path(path)
    with _partial(path, needed=needed) as folder:
        partial = folder / path.name
        partial.touch()
        mode = partial.stat().st_mode & 0o777  # what the umask gives; not every writer keeps it
        yield partial
        partial.chmod(mode)
        _sync(partial)
        os.replace(partial, path)
        shutil.rmtree(folder)


@contextmanager
def atomic_directory(path: str | Path, *, needed: int | None = None) -> Iterator[Path]:
    """A new directory to fill; when the block ends well it becomes ``path``, else it is removed.

    Raises Refused where ``path`` exists already and is not an empty directory, or where the disk is full.
    """
    path = Path(path)
    _check_free(path)
    with _partial(path, needed=needed) as folder:
        yield folder
        _sync_tree(folder)
        _check_free(path)  # somebody may have been faster
        os.replace(folder, path)


@contextmanager
def _partial(path: Path, *, needed: int | None) -> Iterator[Path]:
    """A new directory beside ``path``, gone if the block fails; errors a user can mend become Refused."""
    folder = path.parent / f"{path.name}.partial-{os.getpid()}-{threading.get_native_id()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path, folder.name)
        folder.mkdir()
        yield folder
        _sync(path.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        refusal = _refusal(error, path, needed)
        if refusal is None:
            raise
        raise refusal from error


def _check_free(path: Path) -> None:
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise Refused(f"{path} exists already; choose another name, or remove it first")


def _sweep(path: Path, own: str) -> None:
    """Remove partials of ``path`` whose process is gone; one named ``own`` is a namesake's, for ids recur."""
    pattern = re.compile(re.escape(path.name) + r"\.partial-(\d+)-\d+")
    for entry in list(os.scandir(path.parent)):
        found = pattern.fullmatch(entry.name)
        if found and (entry.name == own or not _alive(int(found[1]))):
            shutil.rmtree(entry.path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's, or no process id at all: not ours to remove
        pass
    return True


def _sync(path: Path) -> None:
    """Have the disk hold what was written to this file, or the entries of this directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            if not (Path(parent) / name).is_symlink():
                _sync(Path(parent) / name)
        _sync(Path(parent))


def _refusal(error: BaseException, path: Path, needed: int | None) -> Refused | None:
    """What to tell a user whose disk is full or may not be written; None where the error is another."""
    number = _errno(error)
    if number in _FULL:
        size = "" if needed is None else f"{readable_size(needed)} needed, "
        free = readable_size(shutil.disk_usage(path.parent).free)
        return Refused(
            f"disk full while writing {path}: {size}{free} free there. Nothing saved before is lost; "
            "make room and run the same command again"
        )
    if number in _FORBIDDEN:
        where = getattr(error, "filename", None) or path
        return Refused(f"{where}: {os.strerror(number)}; change its rights or choose another folder")
    return None


def _errno(error: BaseException) -> int:
    """Number of the operating system's error, 0 where there is none."""
    if isinstance(error, OSError):
        return error.errno or 0
    # The safetensors writer is no Python: its errors carry the number only in their text.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def readable_size(size: float) -> str:
    """A size in bytes for people: ``1.5 GiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


@contextmanager
def locked(path: str | Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file ``path`` (``family.json.lock``) against all other processes and threads here.

    The lock goes when the block ends or the process dies; the file stays and means nothing. Raises Refused
    where ``wait`` is False and another holds it (the message says what and who), or where it cannot be made.
    """
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise Refused(f"cannot lock {path}: {error.strerror}") from error
    try:
        _lock(descriptor, path, wait=wait)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)  # which also unlocks


def _lock(descriptor: int, path: Path, *, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        holder = os.pread(descriptor, 32, 0).decode("ascii", "replace") or "unknown"
        what = path.name.removesuffix(".lock")
        raise Refused(
            f"{what} in {path.parent} is held by another heliostat command (process {holder}); "
            "wait until it has ended, then run this again"
        ) from error


OWNER = "owner.lock"
"""Lock file in a folder that goes with a process, held by that one."""


def hold(path: Path) -> int:
    """Make the lock file and hold it for as long as this process lives, or until the descriptor is closed."""
    new = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    new.rename(path)  # only now do others see it: nobody finds it without its holder
    return descriptor


def abandoned(path: Path) -> bool:
    """Whether it is a lock file that nobody holds any more."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # not there, or not ours
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def remove_abandoned(folders: Iterable[Path]) -> None:
    """Remove those of these folders that are this user's and have lock files, all of which are abandoned."""
    for folder in folders:
        try:
            found = folder.lstat()
        except OSError:
            continue
        locks = list(folder.glob("*.lock")) if stat.S_ISDIR(found.st_mode) else []
        if found.st_uid == os.getuid() and locks and all(map(abandoned, locks)):
            shutil.rmtree(folder, ignore_errors=True)


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Refused, with file and line, where it is missing, damaged or no object."""
    path = Path(path)
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise Refused(f"{path} is not there") from error
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise Refused(f"{path} is damaged: line {line} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise Refused(f"{path} is damaged: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise Refused(f"{path} is damaged: nested too deeply") from error
    if not isinstance(value, dict):
        raise Refused(f"{path} holds {type(value).__name__}, not a JSON object {{...}}")
    return value


class _Once(yaml.SafeLoader):
    """YAML in which each key of a mapping stands once: of two the last would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in found:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands there twice", key.start_mark
                )
            found.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path, *, what: str) -> dict[str, Any]:
    """The values of a YAML file by name, unchecked; ``what`` it should be, for the refusal where it is no mapping."""
    path = Path(path)
    try:
        content = _Once(path.read_text(encoding="utf-8")).get_single_data()
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path} is not UTF-8: byte at position {error.start + 1}") from error
    except yaml.YAMLError as error:
        raise Refused(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise Refused(f"{path} is no {what}")
    return content
