"""Drafted tokens, right and wrong ones, in the simulated memory: what was rolled back is never read, kept or offered."""

import random

from hypothesis import event, given, settings
from hypothesis import strategies as st

from heliostat.engine.batch import passes_of
from heliostat.engine.request import State
from tests.unit.engine.test_simulated_memory import (
    ADD,
    DIGESTS,
    MAX_LENGTH,
    MODULES,
    OTHER,
    STEP,
    Machine,
    happen,
    machine,
    number_of,
    spoken,
)


class Drafting(Machine):
    """The same machine; before a step tokens are drafted for those that decode, as good as chance will have it."""

    dice = random.Random(0)
    share = 0.7  # of drafted tokens are right
    reads = False  # the draft writes into the speakers' pages
    rejected = accepted = 0

    def plan(self):
        for request in self.scheduler.decoding:
            left = request.sampling.max_tokens - len(request.answer) - 1
            most = max(0, min(left, MAX_LENGTH - request.length - 1))
            request.ahead = min(most, self.dice.choice([0, 1, 2, 5, 9]))

    def drafts_of(self, step):
        found = {}
        for chunk in step.chunks:
            done = len(chunk.request.answer)
            right = self.reference[chunk.request.id][done : done + chunk.ahead]
            tokens = [*right, *[0] * (chunk.ahead - len(right))]
            found[chunk.request.id] = [t if self.dice.random() < self.share else t + 1 for t in tokens]
        return found

    def step(self, *, abort=None, abandon=False):
        self.plan()
        running = set(self.scheduler.running)
        step = self.scheduler.schedule()
        assert not step.preempted or not any(
            chunk.ahead for chunk in step.chunks if chunk.request not in running
        )
        assert bool(step.chunks) == bool(self.scheduler.unfinished), "a step gets somebody on"
        self.check_chunks(step)
        drafts = self.drafts_of(step)
        if self.reads:
            self.scribble(step)
        if abandon:
            self.scheduler.abandon(step)
            self.forget_free_pages()
            return
        said = self.run_drafts(step, drafts)
        if abort is not None:
            self.abort(abort)
        accepted = {name: tokens[:-1] for name, tokens in said.items()}
        for request in self.scheduler.commit(step, {n: tokens[-1] for n, tokens in said.items()}, accepted):
            assert request.state is State.FINISHED
        for chunk in step.chunks:
            request = chunk.request
            if request.state is State.RUNNING:
                assert len(request.pages) == self.table.pages_for(request.computed), (
                    "it keeps no page too many"
                )
        self.forget_free_pages()

    def check_chunks(self, step):
        assert sum(c.stop - c.start for c in step.chunks) <= self.scheduler.max_tokens_per_step
        for chunk in step.chunks:
            request = chunk.request
            assert request.computed == chunk.start < chunk.stop <= request.length + chunk.ahead
            assert chunk.ahead <= request.ahead and len(chunk.pages) == self.table.pages_for(chunk.stop)
            if chunk.ahead:
                assert chunk.speaker == request.row.speaker and chunk.start == request.length - 1
            self.check_history(chunk, chunk.start)

    def scribble(self, step):
        """What a draft that reads these pages leaves in them."""
        for chunk in step.chunks:
            for position in range(chunk.start, chunk.stop if chunk.ahead else chunk.start):
                self.memory[self.slot(chunk.pages, position)] = position, number_of("scribbled", position)

    def run_drafts(self, step, drafts):
        """As ``run``; every row says its token, and those are taken that were drafted right."""
        spoke: dict[str, list[int]] = {}
        said: dict[str, list[int]] = {}
        ahead = {chunk.request.id: chunk.ahead for chunk in step.chunks}
        salts = {chunk.pages: chunk.request.salt for chunk in step.chunks}
        for one in passes_of(step, MODULES, page_size=self.table.page_size, drafts=drafts):
            modules = self.modules_of_rows(one)
            writes = dict(zip(one.write_rows, one.write_slots, strict=True))
            seen = {}
            for entry in one.entries:
                for row, visible in zip(entry.rows, entry.visible, strict=True):
                    seen[row] = entry.pages, visible
                    if row in writes:
                        self.write(one, row, writes[row], entry.pages, modules[row], salts[entry.pages])
            for row, request in one.sampled:
                pages, visible = seen[row]
                position, history = self.memory[self.slot(pages, visible - 1)]
                assert position == visible - 1
                spoke.setdefault(request.id, []).append(spoken(history, DIGESTS[modules[row]]))
        for name, tokens in spoke.items():
            assert len(tokens) == 1 + ahead[name]
            right = next((n for n, d in enumerate(drafts[name]) if d != tokens[n]), len(drafts[name]))
            said[name] = tokens[: right + 1]
            self.accepted += right
            self.rejected += len(drafts[name]) - right
        return said


@settings(max_examples=150, deadline=None)
@given(
    pool=st.tuples(
        st.one_of(st.integers(2, 4), st.integers(5, 20)),
        st.integers(1, 4),
        st.sampled_from([8, 24]),
        st.integers(1, 6),
    ),
    events=st.lists(st.one_of(ADD, ADD, STEP, STEP, STEP, OTHER), min_size=15, max_size=50),
    seed=st.integers(0, 99),
    share=st.sampled_from([0.0, 0.7, 1.0]),
    reads=st.booleans(),
)
def test_whatever_is_drafted_every_answer_is_its_rows_own(pool, events, seed, share, reads):
    plain = machine(*pool)
    m = Drafting(plain.scheduler)
    m.dice, m.share, m.reads = random.Random(seed), share, reads
    for what in events:
        happen(m, what)
    m.drain()
    event(f"rolled back: {bool(m.rejected)}, taken: {bool(m.accepted)}")
