"""How a batch is laid out for a row: worked by hand for small conversations, and for any by its rules."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.family import SHARINGS, Row
from heliostat.train.data import Example
from heliostat.train.sharing import lay_out, log_probabilities, sees_all, sees_answer, sees_prompt

ROWS = {
    **{name: sharing.row for name, sharing in SHARINGS.items()},
    "three": Row("a", "b", "c", "c"),
    "three-first": Row("a", "b", "c", "a"),
    "late": Row("base", "base", "own", "base"),
}
TURNS = Example((10, 11, 12, 20, 21, 13, 30, 31, 32), ((3, 5), (6, 9)))


def test_sun_by_hand() -> None:
    layout = lay_out([TURNS], ROWS["sun"])
    assert layout.prompt.tolist() == [[10, 11, 12, 20, 21, 13]]  # all before the last answer, through P
    assert layout.answers is not None
    assert layout.answers.ids.tolist() == [[20, 30, 31]]  # what D reads: each answer but its last token
    assert layout.answers.positions.tolist() == [[3, 6, 7]]
    assert layout.answers.starts.tolist() == [[3, 6, 6]]
    assert layout.answers.number.tolist() == [[0, 1, 1]]
    assert layout.targets.tolist() == [20, 30, 21, 31, 32]  # first tokens by P, the others by D
    assert layout.where.tolist() == [[0, 2], [0, 5], [0, 3], [0, 6], [0, 7]]
    assert layout.tokens == {"own": 6, "base": 3}


def test_prefillshare_by_hand() -> None:
    layout = lay_out([TURNS], ROWS["prefillshare"])
    assert layout.prompt.tolist() == [[10, 11, 12, 20, 21]]  # x_n is read again by the member
    assert layout.answers is not None
    assert layout.answers.ids.tolist() == [[12, 20, 13, 30, 31]]
    assert layout.answers.positions.tolist() == [[2, 3, 5, 6, 7]]
    assert layout.answers.starts.tolist() == [[2, 2, 5, 5, 5]]
    assert layout.targets.tolist() == [20, 21, 30, 31, 32]
    assert layout.from_prompt[0].numel() == 0
    assert layout.tokens == {"base": 5, "own": 5}


def test_icarus_by_hand() -> None:
    layout = lay_out([TURNS], ROWS["icarus"])
    assert layout.prompt.tolist() == [[10, 11, 12, 20, 21, 13, 30, 31]]
    assert layout.answers is not None
    assert layout.answers.ids.tolist() == [[12, 20, 13, 30, 31]]
    assert layout.tokens == {"base": 8, "own": 5}


def test_independent_by_hand() -> None:
    layout = lay_out([TURNS], ROWS["independent"])
    assert layout.answers is None and layout.tokens == {"own": 8}
    assert layout.targets.tolist() == [20, 21, 30, 31, 32]
    assert layout.from_prompt[1].tolist() == [2, 3, 5, 6, 7]


def test_what_queries_see_by_hand() -> None:
    answers = lay_out([TURNS], ROWS["sun"]).answers
    assert answers is not None
    assert sees_prompt(answers, 6)[0, 0].int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    assert sees_answer(answers)[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    answers = lay_out([TURNS], ROWS["icarus"]).answers
    assert answers is not None
    assert sees_all(answers, 8)[0, 0].sum(-1).tolist() == [3, 4, 6, 7, 8]  # its own position included


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    ids: list[int] = []
    answers: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(1, 3))):
        for role in range(2):
            length = draw(st.integers(1, 4))
            if role:
                answers.append((len(ids), len(ids) + length))
            ids += [draw(st.integers(1, 99)) for _ in range(length)]
    return Example(tuple(ids), tuple(answers))


@given(st.lists(conversations(), min_size=1, max_size=4), st.sampled_from(sorted(ROWS)))
@settings(max_examples=120, deadline=None)
def test_every_answer_token_is_learned_once_at_the_place_before_it(
    examples: list[Example], name: str
) -> None:
    layout = lay_out(examples, ROWS[name])
    wanted = {(b, p - 1, e.ids[p]) for b, e in enumerate(examples) for s, t in e.answers for p in range(s, t)}
    got = [
        (*place, token) for place, token in zip(layout.where.tolist(), layout.targets.tolist(), strict=True)
    ]
    assert len(got) == len(set(got)) == layout.spoken and set(got) == wanted
    rows, places = layout.from_prompt
    said = [(b, p, examples[b].ids[p]) for b, p in zip(rows.tolist(), places.tolist(), strict=True)]
    if layout.answers is not None:
        for b, column in zip(*(t.tolist() for t in layout.from_answers), strict=True):
            assert layout.answers.number[b, column] >= 0  # never padding
            said.append((b, int(layout.answers.positions[b, column]), int(layout.answers.ids[b, column])))
    assert said == [(b, p, examples[b].ids[p]) for b, p in layout.where.tolist()]


@given(st.lists(conversations(), min_size=1, max_size=4), st.sampled_from(sorted(ROWS)))
@settings(max_examples=80, deadline=None)
def test_every_query_sees_something_and_nothing_from_later(examples: list[Example], name: str) -> None:
    row, layout = ROWS[name], lay_out(examples, ROWS[name])
    if layout.answers is None:
        return
    width = layout.prompt.shape[1]
    if row.answer_writer == row.prompt_writer:
        seen = sees_all(layout.answers, width)
    else:
        seen = torch.cat([sees_prompt(layout.answers, width), sees_answer(layout.answers)], -1)
    assert seen.any(-1).all()
    for b, example in enumerate(examples):
        for column in range(layout.answers.ids.shape[1]):
            if layout.answers.number[b, column] < 0:
                continue
            position = int(layout.answers.positions[b, column])
            visible = seen[b, 0, column].nonzero().flatten().tolist()
            places = [i if i < width else int(layout.answers.positions[b, i - width]) for i in visible]
            assert sorted(places) == list(range(position + 1)), (example, position)  # each earlier place once


def test_log_probabilities_are_natural() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    got = log_probabilities(logits, torch.tensor([0, 1]))
    torch.testing.assert_close(got, torch.tensor([0.5, 1 / (1 + torch.e**-1)]).log())
