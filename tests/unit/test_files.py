"""Files: whole or not at all, also when the disk is full, the process dies, or two write at once."""

import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import heliostat
from heliostat.errors import Refused
from heliostat.files import (
    OWNER,
    abandoned,
    atomic_directory,
    atomic_write_bytes,
    atomic_write_text,
    locked,
    read_json,
    read_yaml,
    readable_size,
    remove_abandoned,
    saving,
)

SOURCE = str(Path(heliostat.__file__).parents[1])


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def python(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that runs ``program`` with this package on its path."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": SOURCE},
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
    )


def dead_process() -> int:
    """The id of a process that has just ended."""
    ended = python("")
    ended.communicate()
    return ended.pid


def disk_full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---- one file


@pytest.mark.parametrize("data", [b"", b"\x00\xff", "größer\n".encode()])
def test_what_is_written_is_read_and_nothing_else_stays(tmp_path: Path, data: bytes) -> None:
    atomic_write_bytes(tmp_path / "a", b"before")
    atomic_write_bytes(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == data
    assert names(tmp_path) == ["a"]


def test_text_is_utf8_and_parents_are_made(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "deep" / "er" / "a.txt", "größer")
    assert (tmp_path / "deep" / "er" / "a.txt").read_bytes() == "größer".encode()


def test_a_file_gets_the_rights_that_the_umask_gives_whoever_writes_it(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with saving(tmp_path / "a") as partial:
        partial.unlink()
        partial.touch(mode=0o600)  # as writers do that rename a private file of their own
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failed_block_changes_nothing_and_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    atomic_write_text(tmp_path / "a", "before")
    with pytest.raises(type(error)), saving(tmp_path / "a") as partial:
        partial.write_text("half")
        raise error
    assert (tmp_path / "a").read_text() == "before"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_is_refused_with_what_was_needed_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    atomic_write_text(tmp_path / "a", "before")
    monkeypatch.setattr(os, step, disk_full)
    with pytest.raises(
        Refused, match=r"disk full while writing .*/a: 3\.0 KiB needed, .* free there"
    ) as refused:
        atomic_write_bytes(tmp_path / "a", b"x" * 3072)
    assert "Nothing saved before is lost" in str(refused.value)
    monkeypatch.undo()
    assert (tmp_path / "a").read_text() == "before"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_is_known_by_the_text_of_a_writer_that_is_no_python(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="disk full"), saving(tmp_path / "a"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert names(tmp_path) == []


def test_a_folder_that_may_not_be_written_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(source: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))

    monkeypatch.setattr(os, "replace", forbidden)
    with pytest.raises(Refused, match=r"/a: Permission denied; change its rights"):
        atomic_write_text(tmp_path / "a", "x")


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), saving(tmp_path / "a") as partial:
        (partial.parent / "missing").read_bytes()
    assert names(tmp_path) == []


KILLED = """
import os, sys
from heliostat.files import atomic_write_text
os.replace = lambda *_: os._exit(9)
atomic_write_text(sys.argv[1], "half")
"""


def test_a_process_killed_before_the_rename_leaves_the_old_file_and_the_next_writer_sweeps(
    tmp_path: Path,
) -> None:
    atomic_write_text(tmp_path / "a", "before")
    child = python(KILLED, tmp_path / "a")
    child.communicate()
    assert child.returncode == 9
    assert (tmp_path / "a").read_text() == "before"
    assert len(names(tmp_path)) == 2  # the old file and what the dead process left
    atomic_write_text(tmp_path / "a", "after")
    assert (tmp_path / "a").read_text() == "after"
    assert names(tmp_path) == ["a"]


def test_the_sweep_takes_the_dead_and_namesakes_and_spares_the_living_and_strangers(tmp_path: Path) -> None:
    own = f"{os.getpid()}-{threading.get_native_id()}"
    living = f"a.partial-{os.getppid()}-1"
    kept = [living, "ab.partial-1", f"b.partial-{dead_process()}-1", "a.partial-x-1"]
    for name in [*kept, f"a.partial-{dead_process()}-1", f"a.partial-{own}"]:
        (tmp_path / name).mkdir()
    atomic_write_text(tmp_path / "a", "x")
    assert names(tmp_path) == sorted(["a", *kept])


MANY_WRITES = """
import sys
from heliostat.files import atomic_write_text
for i in range(40):
    atomic_write_text(sys.argv[1], sys.argv[2] * 20000)
"""


def test_two_processes_at_once_never_mix_their_bytes(tmp_path: Path) -> None:
    target = tmp_path / "a"
    atomic_write_text(target, "a" * 20000)
    writers = [python(MANY_WRITES, target, letter) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        assert target.read_text() in ("a" * 20000, "b" * 20000)
    assert [writer.wait() for writer in writers] == [0, 0]
    for writer in writers:
        writer.communicate()
    assert names(tmp_path) == ["a"]


# ---- one directory


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "d") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a").write_text("x")
        (partial / "loose").symlink_to("nowhere")
        assert not (tmp_path / "d").exists()
    assert (tmp_path / "d" / "sub" / "a").read_text() == "x"
    assert names(tmp_path) == ["d"]


def test_an_empty_directory_may_be_filled_and_a_full_one_may_not(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with atomic_directory(tmp_path / "d") as partial:
        (partial / "a").touch()
    with pytest.raises(Refused, match="exists already"), atomic_directory(tmp_path / "d"):
        pytest.fail("the block ran")
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="exists already"), atomic_directory(tmp_path / "file"):
        pytest.fail("the block ran")
    assert names(tmp_path) == ["d", "file"]


def test_a_directory_somebody_else_finished_first_is_kept(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="exists already"), atomic_directory(tmp_path / "d"):
        (tmp_path / "d").mkdir()
        (tmp_path / "d" / "theirs").touch()
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["theirs"]


def test_a_failed_directory_leaves_nothing_and_a_full_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"disk full while writing .*/d: 5\.0 MiB needed"):
        with atomic_directory(tmp_path / "d", needed=5 * 2**20) as partial:
            (partial / "a").touch()
            disk_full()
    assert names(tmp_path) == []


KILLED_FILLING = """
import os, sys
from heliostat.files import atomic_directory
with atomic_directory(sys.argv[1]) as partial:
    (partial / "a").write_text("half")
    os._exit(9)
"""


def test_a_process_killed_while_filling_a_directory_leaves_no_directory(tmp_path: Path) -> None:
    python(KILLED_FILLING, tmp_path / "d").communicate()
    assert not (tmp_path / "d").exists()
    assert len(names(tmp_path)) == 1
    with atomic_directory(tmp_path / "d") as partial:
        (partial / "b").touch()
    assert names(tmp_path) == ["d"]
    assert names(tmp_path / "d") == ["b"]


# ---- the lock

HOLD = """
import sys
from heliostat.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""

COUNT = """
import sys
import tempfile
import threading
from pathlib import Path
from heliostat.files import locked
counter = Path(sys.argv[1])
for _ in range(100):
    with locked(f"{counter}.lock"):
        counter.write_text(str(int(counter.read_text()) + 1))
"""


def test_a_held_lock_is_refused_by_name_and_holder_and_free_after_it(tmp_path: Path) -> None:
    lock = tmp_path / "family.json.lock"
    holder = python(HOLD, lock)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(Refused, match=rf"family\.json in .* is held by .*\(process {holder.pid}\)"):
        with locked(lock, wait=False):
            pytest.fail("two hold it")
    holder.communicate("\n")
    with locked(lock, wait=False):
        pass


def test_the_lock_goes_with_a_process_that_is_killed(tmp_path: Path) -> None:
    holder = python(HOLD, tmp_path / "x.lock")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    holder.kill()
    holder.communicate()
    with locked(tmp_path / "x.lock", wait=False):
        pass


def test_two_processes_that_count_under_the_lock_lose_no_count(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    for process in [python(COUNT, counter) for _ in range(2)]:
        process.communicate()
        assert process.returncode == 0
    assert counter.read_text() == "200"


def test_the_lock_goes_when_its_block_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path / "x.lock"):
        raise RuntimeError
    with locked(tmp_path / "x.lock", wait=False):
        pass


def test_a_lock_in_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"cannot lock .*No such file"), locked(tmp_path / "no" / "x.lock"):
        pytest.fail("the block ran")


# ---- reading


@settings(max_examples=30, deadline=None)  # a file an example, and disks take their time
@given(st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.booleans())))
def test_an_object_that_is_written_is_read(value: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # one for each example; pytest's is one for all of them
        atomic_write_text(Path(folder) / "a.json", json.dumps(value))
        assert read_json(Path(folder) / "a.json") == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n "a": 1,\n "b": }', "line 3, column 7: Expecting value"),
        (b'{"a": 1', "line 1"),
        (b"", "line 1, column 1"),
        (b'{\n"a": "\xff"}', "line 2 is not UTF-8"),
        (b"[1]", "holds list, not a JSON object"),
        (b'{"a":' * 100_000, "damaged"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name_and_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "family.json").write_bytes(content)
    with pytest.raises(Refused, match=message) as refused:
        read_json(tmp_path / "family.json")
    assert "family.json" in str(refused.value)


def test_a_missing_file_and_a_directory_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"gone\.json is not there"):
        read_json(tmp_path / "gone.json")
    with pytest.raises(Refused, match="cannot be read"):
        read_json(tmp_path)


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB")]
)
def test_sizes_are_for_people(size: int, shown: str) -> None:
    assert readable_size(size) == shown


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "x: {b: 1, b: 2}\n"])
def test_a_key_that_stands_twice_in_yaml_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(Refused, match=r"recipe.yaml is not YAML: the key '[ab]' stands there twice"):
        read_yaml(path, what="recipe")
    path.write_text("x: &x {b: 1}\ny:\n  <<: *x\n  c: 2\n")
    assert read_yaml(path, what="recipe")["y"] == {"b": 1, "c": 2}


HOLDER = """
import sys
from pathlib import Path
from heliostat.files import hold
hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_folder_goes_when_all_who_held_it_were_killed_and_not_before(tmp_path: Path) -> None:
    folder, plain = tmp_path / "folder", tmp_path / "plain"
    folder.mkdir()
    plain.mkdir()
    (folder / "file").touch()
    (tmp_path / "link").symlink_to(folder)
    holders = [python(HOLDER, folder / name) for name in (OWNER, "another.lock")]
    for holder in holders:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        remove_abandoned(tmp_path.iterdir())
        assert (folder / "file").exists() and not abandoned(folder / OWNER)
    assert names(folder) == ["another.lock", "file", OWNER]
    for holder in holders:
        remove_abandoned(tmp_path.iterdir())
        assert (folder / "file").exists()
        holder.kill()
        holder.communicate()
    assert abandoned(folder / OWNER)
    remove_abandoned([tmp_path / "link"])
    assert folder.exists(), "what a link leads to is somebody else's"
    remove_abandoned([*tmp_path.iterdir(), tmp_path / "gone"])
    assert not folder.exists() and plain.exists() and not abandoned(folder / OWNER)
