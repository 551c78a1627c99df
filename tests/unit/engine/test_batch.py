"""Passes: what shares one, what comes first, which rows write, see and speak."""

from heliostat.engine.batch import Entry, Ran, Segment, passes_of
from heliostat.engine.request import Request
from heliostat.engine.step import Chunk, Step
from heliostat.family import SHARINGS, Row

S = 4
MODULES = {
    "base": ("base", None),
    "int4": ("int4", None),
    "math": ("base", "math"),
    "code": ("base", "code"),
    "full": ("full", None),
    "full2": ("full2", None),
}


def chunk(name, row, start, stop, *, prompt=6, pages=(7, 2, 5), speaks=True):
    """Positions [start, stop) of a request whose token at position p is 100 + p, as the scheduler cuts it."""
    tokens = range(100, 112)
    r = Request(name, row=row, digests={}, prompt=tuple(tokens[:prompt]), answer=list(tokens[prompt:]))
    speaker = r.speaker_of(stop - 1) if speaks else None
    return Chunk(r, start, stop, r.writer_of(start), speaker, tuple(pages))


def row(sharing, own):
    return SHARINGS[sharing].instantiate(own)


def passes(*chunks):
    return passes_of(Step(tuple(chunks)), MODULES, page_size=S)


def sampled(made):
    return [(number, request.id) for number, request in made.sampled]


def test_no_chunks_no_passes():
    assert passes() == []


def test_a_prefill_chunk_writes_every_row_into_its_slots():
    (made,) = passes(chunk("a", row("prefillshare", "math"), 1, 5, speaks=False))
    assert (made.weights, made.tokens, made.positions) == ("base", [101, 102, 103, 104], [1, 2, 3, 4])
    assert made.write_rows == [0, 1, 2, 3]
    assert made.write_slots == [7 * S + 1, 7 * S + 2, 7 * S + 3, 2 * S]
    assert made.segments == [Segment(None, 0, 4)]
    assert made.entries == [Entry([0, 1, 2, 3], (7, 2, 5), [2, 3, 4, 5])]
    assert made.sampled == []


def test_writer_and_speaker_on_the_same_weights_are_two_rows_of_one_pass():
    (made,) = passes(chunk("a", row("icarus", "math"), 6, 7))
    assert (made.tokens, made.positions) == ([106, 106], [6, 6])
    assert (made.write_rows, made.write_slots) == ([0], [2 * S + 2])
    assert made.segments == [Segment(None, 0, 1), Segment("math", 1, 2)]
    assert made.entries == [Entry([0, 1], (7, 2, 5), [7, 7])]
    assert sampled(made) == [(1, "a")]


def test_only_the_last_position_of_a_chunk_gets_a_second_row():
    (made,) = passes(chunk("a", row("icarus", "math"), 5, 9))
    assert made.positions == [5, 6, 7, 8, 8]
    assert made.write_rows == [0, 1, 2, 3]
    assert made.entries[0].visible == [6, 7, 8, 9, 9] and sampled(made) == [(4, "a")]


def test_one_who_writes_and_speaks_is_one_row():
    (made,) = passes(chunk("a", row("independent", "math"), 6, 7))
    assert made.tokens == [106] and made.write_rows == [0] and sampled(made) == [(0, "a")]


def test_two_names_of_one_run_are_one_row():
    alias = Row("base", "base", "alias", "alias")
    one = passes_of(Step((chunk("a", alias, 6, 7),)), {**MODULES, "alias": ("base", None)}, page_size=S)
    assert [(p.tokens, sampled(p)) for p in one] == [([106], [(0, "a")])]


def test_rows_of_different_members_share_a_pass_sorted_by_adapter():
    (made,) = passes(
        chunk("a", row("icarus", "math"), 6, 7, pages=(0, 1)),
        chunk("b", row("independent", "code"), 6, 8, pages=(2, 3)),
        chunk("c", row("sun", "math"), 7, 8, pages=(4, 5)),
        chunk("d", row("sun", "math"), 0, 6, pages=(6, 8)),
    )
    assert made.segments == [Segment(None, 0, 2), Segment("code", 2, 4), Segment("math", 4, 11)]
    assert made.positions == [6, 7, 6, 7, 6, 0, 1, 2, 3, 4, 5]
    assert sampled(made) == [(1, "c"), (3, "b"), (4, "a"), (10, "d")]
    assert [(e.rows, e.pages) for e in made.entries] == [
        ([0, 4], (0, 1)),
        ([2, 3], (2, 3)),
        ([1], (4, 5)),
        ([5, 6, 7, 8, 9, 10], (6, 8)),
    ]
    assert made.write_rows == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10], "the speaker's row 4 writes nothing"


def test_decode_of_a_shared_answer_module_is_one_pass():
    made = passes(*(chunk(name, row("sun", name), 6, 7) for name in ("math", "code", "full", "full2")))
    assert [(p.weights, len(p.tokens), p.segments) for p in made] == [("base", 4, [Segment(None, 0, 4)])]


def test_a_speaker_on_other_weights_speaks_after_the_writer():
    made = passes(chunk("a", row("icarus", "full"), 6, 7))
    assert [p.weights for p in made] == ["base", "full"]
    writes, speaks = made
    assert (writes.write_rows, writes.sampled) == ([0], [])
    assert (speaks.tokens, speaks.positions, speaks.write_rows, speaks.write_slots) == ([106], [6], [], [])
    assert speaks.entries == [Entry([0], (7, 2, 5), [7])] and sampled(speaks) == [(0, "a")]


def test_weights_that_must_speak_for_others_write_last_so_that_one_pass_does_both():
    made = passes(chunk("b", row("independent", "full"), 6, 7), chunk("a", row("icarus", "full"), 6, 7))
    assert [(p.weights, len(p.tokens)) for p in made] == [("base", 1), ("full", 2)]
    assert sampled(made[1]) == [(0, "b"), (1, "a")] and made[1].write_rows == [0]


def test_weights_that_speak_for_each_other_run_once_more():
    one = Row("full", "full", "full2", "full2")
    two = Row("full2", "full2", "full", "full")
    made = passes(chunk("a", one, 6, 7), chunk("b", two, 6, 7))
    assert [(p.weights, len(p.write_rows), sampled(p)) for p in made] == [
        ("full", 1, []),
        ("full2", 1, [(0, "a")]),
        ("full", 0, [(0, "b")]),
    ]


def test_rows_and_passes_are_counted_by_module():
    ran = Ran()
    for _ in range(2):
        for made in passes(
            chunk("a", row("icarus", "math"), 6, 7),
            chunk("b", row("prefillshare", "full"), 1, 5, speaks=False),
        ):
            ran.count(made)
    assert ran.rows == {"base": 2 * (1 + 4), "math": 2}
    assert ran.passes == {"base": 2, "math": 2}
