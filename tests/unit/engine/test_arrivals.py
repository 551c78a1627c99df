"""Pages on their way in: so many bytes between two steps, by arrival, and only what was promised."""

import secrets
from collections.abc import Iterator

import pytest

from heliostat.engine.arrivals import Arrivals
from heliostat.engine.page_table import PageTable
from heliostat.engine.request import Request
from heliostat.engine.scheduler import Scheduler
from heliostat.engine.store import Fetch, Form, Promise, Store
from tests.unit.engine.test_scheduler import S, request

FORM = Form(pages=12, slices=2, slice_bytes=16)


class Two:
    """A lender's memory, and a scheduler with its own."""

    def __init__(self) -> None:
        name = f"heliostat-test-{secrets.token_hex(4)}"
        self.theirs, self.own = (Store.make(f"{name}-{n}", "life", FORM) for n in (0, 1))
        for page in range(FORM.pages):
            for piece in self.theirs.slices(page):
                piece[:] = bytes([page + 1] * len(piece))
        self.scheduler = Scheduler(
            PageTable(12, page_size=S, generations=self.own.generations), max_length=64
        )
        self.arrivals = Arrivals(self.scheduler, step_bytes=2 * FORM.page_bytes)

    def expect(self, name: str, pages: list[int]) -> Request:
        r: Request = request(name, len(pages) * S + 1, "prefillshare")
        r.fetches, r.replays = True, False
        digests = [self.theirs.digest(page) for page in pages]
        generations = [self.theirs.generations[page] for page in pages]
        promise = Promise(self.theirs.name, "life", pages, generations, digests)
        self.scheduler.add(r)
        self.arrivals.expect(r, Fetch(Store.look(self.theirs.name), self.own, promise))
        return r

    def step(self) -> list[tuple[Request, str]]:
        planned = self.scheduler.schedule()
        gone = self.arrivals.bring()
        self.scheduler.commit(planned, {c.request.id: 1 for c in planned.chunks if c.speaker is not None})
        return gone


@pytest.fixture
def two() -> Iterator[Two]:
    made = Two()
    yield made
    for store in (made.theirs, made.own):
        store.close(remove=True)


def test_a_bounded_number_of_bytes_a_step_the_earliest_first(two: Two) -> None:
    a, b = two.expect("a", [5, 3, 8]), two.expect("b", [1, 2])
    filled: list[tuple[int, int]] = []
    while two.scheduler.arriving or not filled:
        assert two.step() == []
        filled.append((a.computed // S, b.computed // S))
    assert filled == [(2, 0), (3, 1), (3, 2)]
    assert [bytes(next(two.own.slices(page)))[0] for page in (*a.pages[:3], *b.pages[:2])] == [6, 4, 9, 2, 3]
    assert two.arrivals.bytes == 5 * FORM.page_bytes


def test_a_page_larger_than_the_bound_comes_all_the_same(two: Two) -> None:
    two.arrivals.step_bytes = 1
    r = two.expect("a", [5, 3])
    two.step()
    assert r.computed == S
    two.step()
    assert r.computed == 2 * S


def test_who_was_promised_what_is_gone_ends_and_the_others_go_on(two: Two) -> None:
    a, b = two.expect("a", [5, 3, 8]), two.expect("b", [1])
    two.theirs.generations[3] += 1
    ((ended, why),) = two.step()
    assert ended is a and a.finish_reason == "gone" and "somebody else" in why and not a.pages
    two.step()
    assert b.computed >= S


def test_an_ended_request_is_not_asked_about_again(two: Two) -> None:
    a = two.expect("a", [5, 3, 8])
    two.step()
    two.scheduler.finish("a")
    two.arrivals.forget("a")
    before = bytes(two.own.content)
    two.step()
    assert bytes(two.own.content) == before and not a.pages
