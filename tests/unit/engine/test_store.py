"""Memory for pages that others read: what they find, what they refuse, and what is left when its owner is gone."""

import fcntl
import os
import secrets
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator

import pytest

from heliostat.engine.store import Fetch, Form, Gone, Promise, Shelves, Store, sweep
from heliostat.errors import Refused

FORM = Form(pages=6, slices=4, slice_bytes=32)
PREFIX = f"heliostat-test-{secrets.token_hex(4)}-"
Made = Callable[..., Store]


@pytest.fixture
def made() -> Iterator[Made]:
    """Makes memories that are gone when the test is."""
    stores: list[Store] = []

    def make(name: str = "one", incarnation: str = "first", form: Form = FORM) -> Store:
        stores.append(Store.make(PREFIX + name, incarnation, form))
        return stores[-1]

    yield make
    for store in stores:
        store.close(remove=True)


def fill(store: Store, page: int, first: int) -> None:
    """Bytes that tell page and slice apart."""
    for number, piece in enumerate(store.slices(page)):
        piece[:] = bytes([first + number] * len(piece))


def promise(store: Store, *pages: int) -> Promise:
    """As an honest owner gives it."""
    generations = [store.generations[page] for page in pages]
    return Promise(store.name, store.incarnation, pages, generations, [store.digest(p) for p in pages])


def content(store: Store, page: int) -> list[bytes]:
    return [bytes(piece) for piece in store.slices(page)]


def test_another_reads_what_one_writes_and_can_write_nothing(made: Made) -> None:
    one = made()
    fill(one, 2, 10)
    seen = Store.look(one.name)
    assert (seen.form, seen.incarnation) == (FORM, "first") and content(seen, 2) == content(one, 2)
    one.generations[2] = 2**40
    assert seen.generations[2] == 2**40
    with pytest.raises(TypeError):
        next(iter(seen.slices(2)))[:] = bytes(32)
    assert os.stat(f"/dev/shm/{one.name}").st_mode & 0o077 == 0 or not os.path.isdir("/dev/shm")


def test_pages_do_not_touch_each_other(made: Made) -> None:
    one = made()
    for page in range(FORM.pages):
        fill(one, page, page * 8)
    for page in range(FORM.pages):
        assert content(one, page) == [bytes([page * 8 + n] * 32) for n in range(FORM.slices)]


def test_a_tail_is_part_of_its_page(made: Made) -> None:
    form = Form(pages=5, slices=2, slice_bytes=32, tail_bytes=24)
    one, two = made("one", form=form), made("two", form=Form(7, 2, 32, 24))
    for page in range(form.pages):
        fill(one, page, page * 8)
    assert Store.look(one.name).form == form and form.page_bytes == 88
    for page in range(form.pages):
        assert content(one, page) == [bytes([page * 8 + n] * size) for n, size in enumerate((32, 32, 24))]
    offer = promise(one, 4)
    one.content[form.pages * 64 + 4 * 24] ^= 1
    fetch = Fetch(Shelves().look(one.name), two, offer)
    with pytest.raises(Gone):
        fetch.bring(0, 6)
    one.content[form.pages * 64 + 4 * 24] ^= 1
    fetch.bring(0, 6)
    assert content(two, 6) == content(one, 4)


def test_promised_pages_are_fetched(made: Made) -> None:
    one, two = made("one"), made("two", form=Form(9, 4, 32))
    fill(one, 1, 10)
    fill(one, 4, 20)
    fetch = Fetch(Shelves().look(one.name), two, promise(one, 4, 1))
    fetch.bring(0, 7)
    fetch.bring(1, 8)
    assert content(two, 7) == content(one, 4) and content(two, 8) == content(one, 1)
    assert fetch.bytes == 2 * FORM.page_bytes


def test_a_page_that_has_another_owner_is_refused_before_and_after_copying(made: Made) -> None:
    one, two = made("one"), made("two")
    fetch = Fetch(Store.look(one.name), two, promise(one, 3))
    one.generations[3] += 1
    with pytest.raises(Gone, match="somebody else"):
        fetch.bring(0, 0)

    class Late(Store):
        def copy(self, page: int, own: Store, target: int) -> None:
            super().copy(page, own, target)
            one.generations[page] += 1

    late = Fetch(Late.look(one.name), two, promise(one, 3))
    with pytest.raises(Gone, match="somebody else"):
        late.bring(0, 0)


def test_a_single_wrong_bit_is_refused(made: Made) -> None:
    one, two = made("one"), made("two")
    fetch = Fetch(Store.look(one.name), two, promise(one, 3))
    list(one.slices(3))[2][5] ^= 1
    with pytest.raises(Gone, match="damaged"):
        fetch.bring(0, 0)


def test_another_life_another_cut_and_pages_that_are_not_there_are_refused(made: Made) -> None:
    one, two, odd = made("one"), made("two"), made("odd", form=Form(6, 4, 64))
    fair = promise(one, 3)
    for wrong, own, why in (
        (Promise(fair.store, "second", fair.pages, fair.generations, fair.digests), two, "earlier life"),
        (fair, odd, "bytes"),
        (Promise(fair.store, "first", [6], [0], [b""]), two, "none of the 6"),
        (Promise(fair.store, "first", [-1], [0], [b""]), two, "none of the 6"),
    ):
        with pytest.raises(Gone, match=why):
            Fetch(Store.look(one.name), own, wrong)


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "../etc/passwd", "heliostat-nothing"])
def test_a_name_that_is_none_is_gone(name: str) -> None:
    with pytest.raises(Gone):
        Store.look(name)


def test_a_file_that_is_cut_short_or_something_else_is_gone(made: Made) -> None:
    one = made()
    path = f"/dev/shm/{one.name}"
    for damage in (lambda: os.truncate(path, 5000), lambda: os.truncate(path, 10)):
        damage()
        with pytest.raises(Gone, match="cut short"):
            Store.look(one.name)


def test_a_memory_is_opened_once_and_forgotten_with_its_name(made: Made) -> None:
    one, two = made("one"), made("two")
    shelves = Shelves()
    seen = shelves.look(one.name)
    assert shelves.look(one.name) is seen
    one.close(remove=True)
    shelves.look(two.name)
    with pytest.raises(Gone):
        shelves.look(one.name)


def test_the_memory_of_the_dead_is_given_up_without_another_look(made: Made) -> None:
    one, two = made("one"), made("two")
    shelves = Shelves()
    dead, kept = weakref.ref(shelves.look(one.name).content.obj), shelves.look(two.name)
    one.close(remove=True)
    shelves.tidy()
    assert dead() is None, "its mapping is gone"
    assert shelves.look(two.name) is kept


def test_a_sweep_before_a_new_memory_is_held_takes_nothing_of_it(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary, swept = fcntl.flock, []

    def late(file: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", ordinary)
        swept.extend(sweep(PREFIX))
        ordinary(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    one = made()
    assert swept == [one.name] and one.alive and Store.look(one.name).incarnation == "first"


def test_the_digest_of_a_full_page_is_read_anew_when_it_is_given_out_again(made: Made) -> None:
    one = made()
    before = one.digest_of_full(1)
    fill(one, 1, 3)
    assert one.digest_of_full(1) == before, "nobody writes a full page"
    one.generations[1] += 1
    assert one.digest_of_full(1) == one.digest(1) != before


def test_a_name_is_taken_once_and_a_memory_that_does_not_fit_is_refused_with_numbers(made: Made) -> None:
    made()
    with pytest.raises(Refused, match="no memory for pages"):
        made()
    with pytest.raises(Refused, match="MiB of shared memory"):
        made("huge", form=Form(2**30, 64, 2**20))
    assert not os.path.exists(f"/dev/shm/{PREFIX}huge")


def test_only_what_the_dead_have_left_is_swept(made: Made) -> None:
    one = made("alive")
    program = (
        "import os, sys; from heliostat.engine.store import *; "
        f"Store.make({PREFIX + 'dead'!r}, 'x', Form(2, 2, 8)); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -9
    assert sweep(PREFIX) == [PREFIX + "dead"]
    assert Store.look(one.name).incarnation == "first"
    assert sweep(PREFIX) == []
