"""Requests, page table, scheduler and passes together, against a simulated memory: no position is ever wrong.

A fake runner executes passes as the real one must. What it writes for a position is the *history* of that
position: everything its keys and values depend on, which is the tokens and writers of all positions up to
it, in order. In every step the memory is compared with the history that each request's row demands.
"""

import hashlib
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from heliostat.engine.batch import passes_of
from heliostat.engine.page_table import PageTable
from heliostat.engine.request import Request, Sampling, State
from heliostat.engine.scheduler import Scheduler
from heliostat.errors import Refused
from heliostat.family import SHARINGS, Row
from tests.unit.engine.invariants import check_pages

EOS = 7
MAX_LENGTH = 40
MODULES = {  # adapters of one base, whole models, and a frozen half of another digest
    "base": ("base", None),
    "int4": ("int4", None),
    "math": ("base", "math"),
    "code": ("base", "code"),
    "full": ("full", None),
    "full2": ("full2", None),
}
NAME_OF = {run: name for name, run in MODULES.items()}
# `code` was never trained: it equals the base, and pages may know it.
DIGESTS = {name: f"digest of {name}" for name in MODULES} | {"code": "digest of base"}
ROWS = {
    f"{sharing}-{own}": SHARINGS[sharing].instantiate(own)
    for sharing in SHARINGS
    for own in ("math", "code", "full", "full2")
} | {
    "sun-int4": Row("math", "int4", "int4", "math"),
    "icarus-int4": Row("base", "base", "int4", "int4"),
    "three": Row("full", "base", "math", "math"),
    "crossed": Row("full2", "full2", "full", "full"),
    "crossed back": Row("full", "full", "full2", "full2"),
}


def number_of(*facts):
    return int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=8).digest(), "big")


def follows(history, digest, token, salt):
    """History of a position: chained, so that equal histories mean equal everything before."""
    return number_of(history, digest, token, salt)


def spoken(history, digest):
    """The token that a module says after that history; few different ones, so that prefixes often meet."""
    chosen = number_of(history, digest, "says")
    return EOS if chosen % 13 == 0 else chosen % 2


def histories(request):
    """The history at each known position that the request's row demands."""
    found, history = [], 0
    for position, token in enumerate(request.tokens):
        history = follows(history, DIGESTS[request.writer_of(position)], token, request.salt)
        found.append(history)
    return found


def reference_answer(request):
    """What the request must answer, from its row alone: no pages, no batch."""
    alone = Request("alone", row=request.row, digests=DIGESTS, prompt=request.prompt, salt=request.salt)
    while True:
        digest = DIGESTS[alone.speaker_of(alone.length - 1)]
        alone.answer.append(spoken(histories(alone)[-1], digest))
        full = len(alone.answer) == request.sampling.max_tokens or alone.length == MAX_LENGTH
        if alone.answer[-1] == EOS or full:
            return alone.answer


@dataclass
class Machine:
    """The scheduler, and a memory of slots that hold (position, history)."""

    scheduler: Scheduler
    memory: dict[int, tuple[int, int]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    key_meaning: dict[bytes, int] = field(default_factory=dict)
    meaning_key: dict[int, bytes] = field(default_factory=dict)
    reference: dict[str, list[int]] = field(default_factory=dict)

    @property
    def table(self):
        return self.scheduler.table

    def slot(self, pages, position):
        return (
            pages[position // self.table.page_size] * self.table.page_size + position % self.table.page_size
        )

    def add(self, row, prompt, max_tokens, salt):
        name = f"r{len(self.requests)}"
        request = Request(
            name,
            row=ROWS[row],
            digests=DIGESTS,
            prompt=tuple(prompt),
            sampling=Sampling(max_tokens=max_tokens),
            member=row,
            salt=salt,
        )
        try:
            self.scheduler.add(request)
        except Refused:
            total = min(len(prompt) + max_tokens, MAX_LENGTH)
            assert len(prompt) >= MAX_LENGTH or total - 1 > self.table.pages * self.table.page_size
            return
        self.requests.append(request)
        self.reference[name] = reference_answer(request)

    def step(self, *, abort=None, abandon=False):
        running = set(self.scheduler.running)
        step = self.scheduler.schedule()
        assert not step.preempted or {chunk.request for chunk in step.chunks} <= running
        assert bool(step.chunks) == bool(self.scheduler.unfinished), "a step gets somebody on"
        self.check_chunks(step)
        if abandon:
            self.scheduler.abandon(step)
            return
        tokens = self.run(step)
        for chunk in step.chunks:
            self.check_history(chunk, chunk.stop)
        if abort is not None:
            self.abort(abort)
        for request in self.scheduler.commit(step, tokens):
            assert request.state is State.FINISHED
        self.forget_free_pages()

    def abort(self, number):
        if self.requests:
            self.scheduler.finish(self.requests[number % len(self.requests)].id)

    def check_chunks(self, step):
        assert sum(c.stop - c.start for c in step.chunks) <= self.scheduler.max_tokens_per_step
        assert len({c.request.id for c in step.chunks}) == len(step.chunks) <= self.scheduler.max_running
        for chunk in step.chunks:
            request = chunk.request
            assert request.computed == chunk.start < chunk.stop <= request.length
            assert {request.writer_of(p) for p in range(chunk.start, chunk.stop)} == {chunk.writer}
            assert not chunk.start < request.boundary < chunk.stop
            speaker = request.speaker_of(chunk.stop - 1) if chunk.stop == request.length else None
            assert chunk.speaker == speaker
            self.check_history(chunk, chunk.start)

    def check_history(self, chunk, stop):
        """All positions before stop hold exactly what this request's row demands."""
        for position, history in enumerate(histories(chunk.request)[:stop]):
            assert self.memory.get(self.slot(chunk.pages, position)) == (position, history)

    def run(self, step):
        """Execute the passes as the real runner must; returns the tokens that were said."""
        passes = passes_of(step, MODULES, page_size=self.table.page_size)
        salts = {chunk.pages: chunk.request.salt for chunk in step.chunks}
        written, tokens = [], {}
        for one in passes:
            modules = self.modules_of_rows(one)
            writes = dict(zip(one.write_rows, one.write_slots, strict=True))
            assert sorted(row for e in one.entries for row in e.rows) == list(range(len(one.tokens)))
            seen = {}
            for entry in one.entries:
                for row, visible in zip(entry.rows, entry.visible, strict=True):
                    assert visible == one.positions[row] + 1
                    seen[row] = entry.pages, visible
                    if row in writes:
                        self.write(one, row, writes[row], entry.pages, modules[row], salts[entry.pages])
            written += one.write_slots
            for row, request in one.sampled:
                pages, visible = seen[row]
                position, history = self.memory[self.slot(pages, visible - 1)]
                assert position == visible - 1 == request.length - 1 and request.id not in tokens
                tokens[request.id] = spoken(history, DIGESTS[modules[row]])
        assert sorted(written) == sorted(
            self.slot(c.pages, p) for c in step.chunks for p in range(c.start, c.stop)
        )
        assert set(tokens) == {chunk.request.id for chunk in step.chunks if chunk.speaker is not None}
        return tokens

    def modules_of_rows(self, one):
        edges = [edge for s in one.segments for edge in (s.start, s.stop)]
        assert edges[0] == 0 and edges[-1] == len(one.tokens) == len(one.positions) > 0
        assert edges[1:-1:2] == edges[2::2], "segments are consecutive"
        assert len({s.adapter for s in one.segments}) == len(one.segments)
        return [NAME_OF[one.weights, s.adapter] for s in one.segments for _ in range(s.start, s.stop)]

    def write(self, one, row, slot, pages, module, salt):
        page, position = slot // self.table.page_size, one.positions[row]
        assert self.table._references[page] == 1 and self.table._published[page] is None
        before = 0
        if position:
            at, before = self.memory[self.slot(pages, position - 1)]
            assert at == position - 1
        self.memory[slot] = position, follows(before, DIGESTS[module], one.tokens[row], salt)

    def forget_free_pages(self):
        """A free page holds nothing: reading one is an error, not luck."""
        for page in self.table._free:
            for slot in range(page * self.table.page_size, (page + 1) * self.table.page_size):
                self.memory.pop(slot, None)

    def check(self):
        check_pages(self.scheduler, self.requests)
        self.check_keys()
        for request in self.requests:
            expected = self.reference[request.id]
            assert request.answer == expected[: len(request.answer)]
            if request.state is State.FINISHED and request.finish_reason != "abort":
                assert request.answer == expected
                assert request.finish_reason == ("stop" if expected[-1] == EOS else "length")

    def check_keys(self):
        """A page's key and the history it ends in name each other, for ever."""
        for page, published in enumerate(self.table._published):
            if published is not None:
                slots = range(page * self.table.page_size, (page + 1) * self.table.page_size)
                positions, found = zip(*(self.memory[slot] for slot in slots), strict=True)
                assert list(positions) == list(range(positions[0], positions[0] + self.table.page_size))
                assert self.key_meaning.setdefault(published.key, found[-1]) == found[-1]
                assert self.meaning_key.setdefault(found[-1], published.key) == published.key

    def drain(self):
        left = 2000
        while self.scheduler.unfinished:
            self.step()
            self.check()
            left -= 1
            assert left, "it does not come to an end"
        assert not any(self.table._references) and self.table.available() == self.table.pages


def machine(pages, page_size, budget, running):
    table = PageTable(pages, page_size=page_size)
    return Machine(
        Scheduler(
            table,
            max_length=MAX_LENGTH,
            max_tokens_per_step=max(budget, running),
            max_running=running,
            eos_ids=(EOS,),
        )
    )


def happen(m, what):
    """One event; an addition's prompt goes on where an earlier request got to, or starts anew."""
    kind, number, *rest = what
    if kind == "add":
        row, parent, kept, tail, max_tokens, salt = rest
        known = m.requests[parent % len(m.requests)].tokens if parent and m.requests else ()
        m.add(row, (*known[:kept], *tail), max_tokens, salt)
    elif kind == "abort":
        m.abort(number)
        m.forget_free_pages()
    else:
        m.step(abort=number if kind == "step and abort" else None, abandon=kind == "abandon")
    m.check()


ADD = st.tuples(
    st.just("add"),
    st.just(0),
    st.sampled_from(sorted(ROWS)),
    st.integers(0, 5),
    st.integers(0, 30),
    st.lists(st.integers(0, 1), min_size=1, max_size=9),
    st.integers(1, 12),
    st.sampled_from(["", "", "", "tenant"]),
)
STEP = st.just(("step", 0))
OTHER = st.tuples(st.sampled_from(["abort", "step and abort", "abandon"]), st.integers(0, 9))


@settings(max_examples=300, deadline=None)
@given(
    pool=st.tuples(
        st.one_of(st.integers(1, 3), st.integers(4, 20), st.integers(8, 12)),
        st.integers(1, 4),
        st.integers(1, 12),
        st.integers(1, 5),
    ),
    events=st.lists(st.one_of(ADD, ADD, STEP, STEP, STEP, OTHER), min_size=15, max_size=50),
)
def test_every_position_holds_what_its_request_demands(pool, events):
    m = machine(*pool)
    for what in events:
        happen(m, what)
    m.drain()
    counters = m.table.counters
    event(f"preempted: {any(r.preemptions for r in m.requests)}")
    event(f"hits: {counters.hit_tokens > 0}, of others: {bool(counters.shared_hits)}")
    event(f"evicted: {counters.evictions > 0}")


@pytest.mark.parametrize("seed", range(8))
def test_a_crowd_in_a_small_pool(seed):
    """Longer than what hypothesis makes: members over common prefixes, constant preemption and eviction."""
    rng = random.Random(seed)
    page_size = rng.choice((2, 3, 4))
    m = machine(50 // page_size, page_size, rng.choice((6, 16, 64)), 6)
    for _ in range(400):
        kind = rng.choices(("add", "step", "abort", "step and abort", "abandon"), (35, 55, 3, 4, 3))[0]
        rest = (
            rng.choice(sorted(ROWS)),
            rng.randint(0, 8),
            rng.randint(0, 24),
            rng.choices((0, 1), k=rng.randint(1, 9)),
            rng.randint(1, 12),
            rng.choice(("", "", "tenant")),
        )
        happen(m, (kind, rng.randrange(99), *rest))
    m.drain()
    assert any(r.preemptions for r in m.requests) and m.table.counters.evictions
    assert m.table.counters.hit_tokens and m.table.counters.shared_hits
