"""Two schedulers and two simulated memories: what one hands over is what the other goes on from, or is refused.

The memories are those of test_simulated_memory: a position holds everything that its keys and values depend on. Pages
are fetched as the real store does it, by generation, at any later moment: after a release, an eviction, a new owner.
"""

import random
from dataclasses import dataclass, field

import pytest

from heliostat.engine.request import Request, Sampling, State
from tests.unit.engine.test_simulated_memory import (
    DIGESTS,
    ROWS,
    Machine,
    machine,
    reference_answer,
)


@dataclass
class Promise:
    """What was handed over: pages of the other memory and their generations."""

    request: Request
    pages: list[int]
    generations: list[int]


@dataclass
class Half:
    """One side: requests that hand over, or that fetch, or neither."""

    inner: Machine
    fetching: dict[str, Promise] = field(default_factory=dict)

    def add(self, request: Request, promise: Promise | None = None) -> None:
        self.inner.scheduler.add(request)
        self.inner.requests.append(request)
        alone = Request("", row=request.row, digests=DIGESTS, prompt=request.prompt, salt=request.salt)
        alone.sampling = request.sampling
        self.inner.reference[request.id] = reference_answer(alone)
        if promise is not None:
            self.fetching[request.id] = promise

    def step(self, other: "Half | None" = None) -> list[Request]:
        """One step; returns those handed over in it."""
        m = self.inner
        step = m.scheduler.schedule()
        for request in m.scheduler.arriving:
            assert other is not None
            self._fetch(request, other)
        m.check_chunks(step)
        assert all(c.stop <= c.request.boundary for c in step.chunks if c.request.hands_over)
        fetched = [c for c in step.chunks if c.request.id in self.fetching]
        assert all(
            c.start >= c.request.boundary for c in fetched if c.request.fetches or not c.request.replays
        )
        tokens = m.run(step)
        handed = [*step.handed, *m.scheduler.commit(step, tokens)]
        for request in m.scheduler.lost:
            assert request.fetches and not request.replays and request.finish_reason == "lost"
        m.scheduler.lost.clear()
        m.forget_free_pages()
        self.check()
        return [request for request in handed if request.state is State.HANDED]

    def _fetch(self, request: Request, other: "Half") -> None:
        """One more page, if it is still what was promised."""
        m, theirs, promise = self.inner, other.inner, self.fetching[request.id]
        size = m.table.page_size
        index = request.computed // size
        page = promise.pages[index]
        if theirs.table.generations[page] != promise.generations[index]:
            m.scheduler.finish(request.id, "gone")
            return
        for place in range(size):
            if index * size + place < request.boundary:
                m.memory[request.pages[index] * size + place] = theirs.memory[page * size + place]
        m.scheduler.arrived(request, 1)

    def check(self) -> None:
        m = self.inner
        for request in m.requests:
            if request.finish_reason in ("lost", "gone"):
                assert not request.pages
                request.finish_reason = "abort"  # what Machine.check lets end anywhere
            if request.state is State.HANDED:
                for position in range(request.boundary):
                    assert m.memory[m.slot(request.pages, position)][0] == position
        m.check()


def free_pages_keep_their_content(m: Machine) -> None:
    """Unlike in the other simulation a page that nobody holds may still be read, until it is given out again."""
    m.forget_free_pages = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize("seed", range(6))
def test_what_is_handed_over_is_what_is_gone_on_from(seed: int) -> None:
    dice = random.Random(seed)
    size = dice.choice((1, 2, 3, 4))
    first = Half(machine(dice.choice((30, 60)) // size, size, dice.choice((6, 16, 64)), 6))
    second = Half(machine(dice.choice((40, 60)) // size, size, dice.choice((6, 16, 64)), 6))
    free_pages_keep_their_content(first.inner)
    free_pages_keep_their_content(second.inner)
    promises: list[Promise] = []
    count = 0
    for _ in range(400):
        if dice.random() < 0.3:
            row = dice.choice(sorted(ROWS))
            known = dice.choice(first.inner.requests).prompt if count > 3 else ()
            prompt = (*known[: dice.randint(0, 20)], *dice.choices((0, 1), k=dice.randint(1, 6)))
            wish = Sampling(max_tokens=dice.randint(1, 8))
            salt = dice.choice(("", "", "tenant"))
            count += 1
            first.add(
                Request(
                    f"r{count}",
                    row=ROWS[row],
                    digests=DIGESTS,
                    prompt=prompt,
                    sampling=wish,
                    salt=salt,
                    hands_over=True,
                )
            )
        for request in first.step():
            generations = [first.inner.table.generations[page] for page in request.pages]
            promises.append(Promise(request, list(request.pages), generations))
        if promises and dice.random() < 0.6:
            promise = promises.pop(dice.randrange(len(promises)))
            if dice.random() < 0.3:  # too late, or never wanted
                first.inner.scheduler.finish(promise.request.id)
            if dice.random() < 0.9:
                old = promise.request
                second.add(
                    Request(
                        old.id,
                        row=old.row,
                        digests=DIGESTS,
                        prompt=old.prompt,
                        sampling=old.sampling,
                        salt=old.salt,
                        answer=list(old.answer),
                        fetches=True,
                        replays=dice.random() < 0.3,
                    ),
                    promise,
                )
            else:
                first.inner.scheduler.finish(promise.request.id)
        second.step(first)
        for request in second.inner.requests:
            if request.state is State.FINISHED and request.id in first.inner.scheduler.handed:
                first.inner.scheduler.finish(request.id)
        if dice.random() < 0.05 and second.inner.requests:
            second.inner.scheduler.finish(dice.choice(second.inner.requests).id)
    for _ in range(500):
        first.step()
        for name in list(first.inner.scheduler.handed):
            if name not in {r.id for r in second.inner.scheduler.requests}:
                first.inner.scheduler.finish(name)
        second.step(first)
    for half in (first, second):
        assert not half.inner.scheduler.unfinished
        assert half.inner.table.available() == half.inner.table.pages
        assert not any(half.inner.table._references)
    ended = [r for r in second.inner.requests if r.answer == second.inner.reference[r.id]]
    assert len(ended) > 20
