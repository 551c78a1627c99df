"""Requests and sampling: defaults, limits with their messages, and who writes and speaks at each position."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.engine.request import Request, Sampling, State
from heliostat.errors import Refused
from heliostat.family import SHARINGS


def request(prompt=(1, 2, 3), sharing="sun", **fields):
    row = SHARINGS[sharing].instantiate("math.own")
    return Request("r", row=row, digests={name: name for name in row.modules}, prompt=tuple(prompt), **fields)


def test_greedy_without_penalties_is_the_default():
    sampling = Sampling()
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (256, 0.0, 1.0, 0)
    assert (sampling.stop, sampling.logprobs, dict(sampling.logit_bias)) == ((), None, {})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 1.01),
        ("top_p", 0),
        ("top_k", -1),
        ("min_p", 1.5),
        ("choice", -1),
        ("logprobs", -1),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
    ],
)
def test_a_value_outside_its_limits_is_refused_by_name(field, value):
    with pytest.raises(Refused, match=rf"{field} is {value!r}[,;].*(allowed is|must be at least)"):
        Sampling(**{field: value})


def test_limits_themselves_are_allowed():
    Sampling(
        max_tokens=1, min_tokens=1, top_p=1, min_p=1, logprobs=0, presence_penalty=-2, frequency_penalty=2
    )
    Sampling(max_tokens=10**400)


def test_what_contradicts_itself_is_refused():
    with pytest.raises(Refused, match="min_tokens 5 is more than max_tokens 4"):
        Sampling(max_tokens=4, min_tokens=5)
    with pytest.raises(Refused, match="empty stop string"):
        Sampling(stop=("\n", ""))
    with pytest.raises(Refused, match="max_tokens is 0; it must be at least 1$"):
        Sampling(max_tokens=0)
    with pytest.raises(Refused, match="temperature is inf; it must be at least 0, and finite"):
        Sampling(temperature=float("inf"))
    with pytest.raises(Refused, match="logit_bias of token 7 is 101"):
        Sampling(logit_bias={7: 101})


def test_an_empty_prompt_is_refused():
    with pytest.raises(Refused, match="'r' has an empty prompt"):
        request(())


def test_a_new_request_has_nothing_yet():
    new = request()
    assert (new.state, new.computed, new.pages, new.answer, new.finish_reason) == (State.NEW, 0, [], [], None)
    assert new.length == 3


@given(
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    answer=st.lists(st.integers(0, 9), max_size=6),
    ends=st.tuples(st.integers(0, 13), st.integers(0, 13)),
)
def test_token_ids_is_a_slice_of_prompt_and_answer(prompt, answer, ends):
    r = request(prompt, answer=answer)
    start, stop = min(ends), max(ends)
    assert r.tokens == (*prompt, *answer) and r.length == len(r.tokens)
    assert tuple(r.token_ids(start, stop)) == r.tokens[start:stop]


@pytest.mark.parametrize(
    (
        "sharing",
        "writers",
        "speakers",
    ),  # at positions 1, 2 (the last prompt token), 3 of a prompt of three tokens
    [
        ("independent", ("own", "own", "own"), ("own", "own")),
        ("sun", ("own", "own", "base"), ("own", "base")),
        ("prefillshare", ("base", "own", "own"), ("own", "own")),
        ("icarus", ("base", "base", "base"), ("own", "own")),
    ],
)
def test_who_writes_and_speaks(sharing, writers, speakers):
    r = request(sharing=sharing)
    names = {"own": "math.own", "base": "base"}
    assert tuple(r.writer_of(p) for p in (1, 2, 3)) == tuple(names[w] for w in writers)
    assert tuple(r.speaker_of(p) for p in (2, 3)) == tuple(names[s] for s in speakers)
    assert r.boundary == (3 if sharing in ("independent", "sun") else 2)
