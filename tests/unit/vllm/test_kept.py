"""Keys and values kept as files: loaded exactly as they were, or refused; nothing stays behind; nobody else looks in."""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from torch import Tensor

from heliostat.errors import Refused
from heliostat.vllm import kept

LABEL = kept.Label("writer", 5, "ids", "fit", "layout", "0/1")


def pages(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {f"layer.{n}": torch.randn(2, 3, 4, generator=chance).to(dtype) for n in range(2)}


def handle(own: str = "me") -> str:
    return f"{own}-{uuid4().hex}"


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[kept.Shelf]:
    made = kept.Shelf(kept.private_folder(str(tmp_path / "handed")), "me", 1 << 20, 60.0).open()
    yield made
    made.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_what_is_kept_is_loaded_bit_by_bit(shelf: kept.Shelf, dtype: torch.dtype) -> None:
    name, wanted = handle(), pages(dtype=dtype)
    shelf.write(name, LABEL, wanted)
    kept.check(shelf.folder, name, replace(LABEL, layout=""))
    kept.check_any(shelf.folder, name, replace(LABEL, layout="", part=""))
    found = kept.read(shelf.folder, name, LABEL)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[layer], wanted[layer]) for layer in wanted)
    kept.release(shelf.folder, name)
    with pytest.raises(Refused, match="not there"):
        kept.read(shelf.folder, name, LABEL)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("writer", replace(LABEL, writer="another")),
        ("tokens", replace(LABEL, tokens=6)),
        ("ids", replace(LABEL, ids="another")),
        ("fit", replace(LABEL, fit="another")),
        ("layout", replace(LABEL, layout="another")),
    ],
)
def test_anything_else_is_refused_by_name(shelf: kept.Shelf, field: str, other: kept.Label) -> None:
    name = handle()
    shelf.write(name, LABEL, pages())
    with pytest.raises(Refused, match=f"differs: {field}$"):
        kept.read(shelf.folder, name, other)


def test_a_changed_bit_is_found(shelf: kept.Shelf) -> None:
    name = handle()
    shelf.write(name, LABEL, pages())
    file = kept.file_of(shelf.folder, name)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(Refused, match="digest"):
        kept.read(shelf.folder, name, LABEL)
    file.write_bytes(data[:-8])
    with pytest.raises(Refused):
        kept.read(shelf.folder, name, LABEL)


@pytest.mark.parametrize("name", ["", "..", "me-../../etc", f"me/{'0' * 32}", f"me-{'0' * 31}"])
def test_a_handle_is_no_path(shelf: kept.Shelf, name: str) -> None:
    with pytest.raises(Refused, match="handle"):
        kept.check(shelf.folder, name, LABEL)
    with pytest.raises(Refused, match="handle"):
        kept.check_any(shelf.folder, name, LABEL)
    kept.release(shelf.folder, name)


def test_memory_is_bounded_and_comes_back(shelf: kept.Shelf) -> None:
    shelf.keep_bytes = 500
    first = handle()
    shelf.write(first, LABEL, pages())
    with pytest.raises(Refused, match="at most"):
        shelf.write(handle(), LABEL, pages())
    kept.release(shelf.folder, first)
    shelf.write(handle(), LABEL, pages())


def test_others_may_take_away_what_is_just_being_counted(shelf: kept.Shelf) -> None:
    over = threading.Event()

    def take() -> None:
        while not over.is_set():
            for file in shelf.folder.glob("*.pages"):
                kept.release(shelf.folder, file.name.split(".")[0])

    taking = threading.Thread(target=take)
    taking.start()
    try:
        for _ in range(200):
            shelf.write(handle(), LABEL, pages())
    finally:
        over.set()
        taking.join()


def test_what_nobody_fetches_goes_with_its_lease(shelf: kept.Shelf) -> None:
    old, new = handle(), handle()
    shelf.write(old, LABEL, pages())
    shelf.refuse(handle(), "why not")
    past = time.time() - 61
    for file in shelf.folder.glob("me-*"):
        os.utime(file, (past, past))
    shelf.write(new, LABEL, pages())
    assert [file.name.partition(".")[0] for file in shelf.folder.glob("me-*")] == [new]


def test_the_dead_are_swept_and_the_living_are_not(tmp_path: Path) -> None:
    folder = kept.private_folder(str(tmp_path / "handed"))
    living = kept.Shelf(folder, "living", 1 << 20, 60.0).open()
    living.write(kept_by_living := handle("living"), LABEL, pages())
    dead = kept.Shelf(folder, "dead", 1 << 20, 60.0).open()
    dead.write(handle("dead"), LABEL, pages())
    assert dead._lock is not None
    os.close(dead._lock)  # as the system does when a process ends
    new = kept.Shelf(folder, "new", 1 << 20, 60.0).open()
    assert not list(folder.glob("dead*"))
    kept.check(folder, kept_by_living, LABEL)
    new.close()
    living.close()
    assert not list(folder.iterdir())


def test_why_nothing_is_kept_can_be_asked(shelf: kept.Shelf) -> None:
    name = handle()
    assert kept.refusal(shelf.folder, name) == ""
    shelf.refuse(name, "no room")
    assert kept.refusal(shelf.folder, name) == "no room"
    kept.release(shelf.folder, name)
    assert kept.refusal(shelf.folder, name) == ""


def test_nobody_else_enters_the_folder(tmp_path: Path) -> None:
    folder = kept.private_folder(str(tmp_path / "handed"))
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with pytest.raises(Refused, match="700"):
        kept.private_folder(str(tmp_path / "handed"))
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refused, match="700"):
        kept.private_folder(str(tmp_path / "handed"))


@pytest.mark.parametrize(
    ("shape", "dim", "split"), [((6, 2, 4), 0, 1), ((2, 6, 4), 1, 1), ((12, 2, 4), 0, 2), ((6, 6), 0, 1)]
)
def test_whole_pages_are_taken_and_put_wherever_they_lie(
    shape: tuple[int, ...], dim: int, split: int
) -> None:
    source, target = torch.randn(shape), torch.zeros(shape)
    one, other = kept.Cache.of("layer", source, 6), kept.Cache.of("layer", target, 6)
    assert (one.dim, one.split) == (dim, split) and one.facts == other.facts
    other.put([5, 2], one.take([1, 4]))
    for to, origin in ((5, 1), (2, 4)):
        for piece in range(split):
            found = target.select(dim, to * split + piece)
            assert torch.equal(found, source.select(dim, origin * split + piece))
    assert int(target.ne(0).sum()) == 2 * split * source.select(dim, 0).numel()


def test_what_is_no_cache_of_pages_is_refused() -> None:
    with pytest.raises(Refused, match="7 pages"):
        kept.Cache.of("layer", torch.zeros(6, 2, 4), 7)
    cache = kept.Cache.of("layer", torch.zeros(6, 2, 4), 6)
    with pytest.raises(Refused, match="2 pieces"):
        cache.put([0, 1], torch.zeros(1, 2, 4))
