"""Turns a step into passes: which rows run through which weights, what each writes, sees, says. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from heliostat.engine.request import Request
from heliostat.engine.step import Chunk, Step

_NONE: Mapping[str, Sequence[int]] = MappingProxyType({})

Run = tuple[str, str | None]
"""How a module runs: (name of its weights, name of its adapter or None). Equal weights share a pass."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) of a pass run with one adapter, or with none."""

    adapter: str | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One request's attention in a pass: N queries over the same pages, so that these are read once.

    The two rows of a token are two queries of one entry, with the same ``visible``.
    """

    rows: list[int]
    """[N] row of each query, ascending."""
    pages: tuple[int, ...]
    """[ceil(max(visible) / S)] or more page numbers: position p is at slot pages[p // S] * S + p % S."""
    visible: list[int]
    """[N] positions [0, visible) that each query sees: all before its own, and its own."""


@dataclass(slots=True)
class Pass:
    """One forward through one transformer's weights, over T rows.

    At each layer all keys and values of the pass are written before any of its queries attends: the rows of
    a chunk see each other through the pages. There is at least one row; every row is in exactly one segment
    and one entry. Rows say nothing unless they are in ``sampled``, so the head needs only those.
    """

    weights: str
    tokens: list[int] = field(default_factory=list)
    """[T] token ids."""
    positions: list[int] = field(default_factory=list)
    """[T] absolute positions."""
    write_rows: list[int] = field(default_factory=list)
    """[W] rows whose keys and values go into the pool, ascending; not those that only speak."""
    write_slots: list[int] = field(default_factory=list)
    """[W] where to: page * S + offset. No slot occurs twice in a step."""
    filled: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    """Pages whose last slot is written, of one chunk each, in order, behind the page before them, or -1 for none."""
    segments: list[Segment] = field(default_factory=list)
    """Consecutive, covering [0, T); no adapter first, then each adapter once, by name."""
    entries: list[Entry] = field(default_factory=list)
    """One a chunk, in the step's order."""
    sampled: list[tuple[int, Request]] = field(default_factory=list)
    """(row, request): the row's logits choose a token of the request's. Several of one request stand together, in
    order: where drafted tokens are read, each row chooses the token after its own."""


@dataclass(slots=True)
class Ran:
    """What has run so far, by module: rows, and passes in which the module had any."""

    rows: Counter[str] = field(default_factory=Counter)
    passes: Counter[str] = field(default_factory=Counter)

    def count(self, each: Pass) -> None:
        """A pass has run."""
        for segment in each.segments:
            module = segment.adapter or each.weights
            self.rows[module] += segment.stop - segment.start
            self.passes[module] += 1


@dataclass(frozen=True, slots=True)
class _Span:
    """Positions [start, chunk.stop) of a chunk through one adapter: its share of a pass."""

    chunk: Chunk
    adapter: str | None
    start: int
    writes: bool
    speaks: bool


def passes_of(
    step: Step, modules: Mapping[str, Run], *, page_size: int, drafts: Mapping[str, Sequence[int]] = _NONE
) -> list[Pass]:
    """The passes of a step, in the order in which they must run.

    ``modules`` says how each module runs; ``drafts`` are the tokens behind those that are known, by request. Whoever
    only speaks comes with or after who writes.
    """
    order = order_of(step.chunks, modules)
    spans: dict[tuple[int, str], list[_Span]] = {(0, weights): [] for weights in order}
    for chunk in step.chunks:
        writer = modules[chunk.writer]
        speaker = writer if chunk.speaker is None else modules[chunk.speaker]
        one_row = chunk.speaker is not None and speaker == writer
        spans[0, writer[0]].append(_Span(chunk, writer[1], chunk.start, True, one_row))
        if speaker != writer:
            # Weights whose turn is not over take the speaker's row along; others run once more.
            late = order.get(speaker[0], -1) < order[writer[0]]
            span = _Span(chunk, speaker[1], chunk.stop - 1 - chunk.ahead, False, True)
            spans.setdefault((int(late), speaker[0]), []).append(span)
    rounds = sorted(spans.items(), key=lambda item: item[0][0])  # stable: keeps the order inside a round
    return [_pass(weights, found, page_size, drafts) for (_, weights), found in rounds]


def order_of(chunks: Sequence[Chunk], modules: Mapping[str, Run]) -> dict[str, int]:
    """The weights that write, numbered so that those who must speak for others come late."""
    writing = dict.fromkeys(modules[chunk.writer][0] for chunk in chunks)
    visits = Counter(
        modules[chunk.speaker][0]
        for chunk in chunks
        if chunk.speaker is not None and modules[chunk.speaker][0] != modules[chunk.writer][0]
    )
    return {weights: number for number, weights in enumerate(sorted(writing, key=lambda w: visits[w]))}


def _pass(weights: str, spans: Sequence[_Span], page_size: int, drafts: Mapping[str, Sequence[int]]) -> Pass:
    made = Pass(weights)
    entries = {span.chunk.request.id: Entry([], span.chunk.pages, []) for span in spans}
    for span in sorted(spans, key=lambda s: (s.adapter is not None, s.adapter or "")):
        rows = _add_rows(made, span, page_size, drafts.get(span.chunk.request.id, ()))
        entry = entries[span.chunk.request.id]
        entry.rows.extend(rows)
        entry.visible.extend(range(span.start + 1, span.chunk.stop + 1))
        if span.speaks:
            made.sampled.extend((row, span.chunk.request) for row in rows[-1 - span.chunk.ahead :])
    made.entries.extend(entries.values())
    return made


def _add_rows(made: Pass, span: _Span, page_size: int, drafted: Sequence[int]) -> range:
    chunk, first = span.chunk, len(made.tokens)
    made.tokens.extend(chunk.request.token_ids(span.start, chunk.stop))
    known = chunk.request.length
    made.tokens.extend(drafted[max(span.start - known, 0) : max(chunk.stop - known, 0)])
    made.positions.extend(range(span.start, chunk.stop))
    rows = range(first, len(made.tokens))
    if span.writes:
        made.write_rows.extend(rows)
        made.write_slots.extend(
            chunk.pages[p // page_size] * page_size + p % page_size for p in range(span.start, chunk.stop)
        )
        if full := chunk.pages[(begin := span.start // page_size) : chunk.stop // page_size]:
            made.filled.append((chunk.pages[begin - 1] if begin else -1, full))
    if made.segments and made.segments[-1].adapter == span.adapter:
        first = made.segments.pop().start
    made.segments.append(Segment(span.adapter, first, rows.stop))
    return rows
