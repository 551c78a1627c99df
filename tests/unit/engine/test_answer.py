"""Text while it is spoken: stop strings across tokens are found and kept out, and nothing else is lost."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heliostat.engine.answer import Spoken
from heliostat.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.load(tiny_base)


def speak(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]) -> tuple[list[str], Spoken]:
    spoken = Spoken.begin(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(spoken.push(token))
        if spoken.stopped:
            return pieces, spoken
    return [*pieces, spoken.finish()], spoken


def first_stop(text: str, stop: tuple[str, ...]) -> str:
    """What is before the stop string that ends first, as a reader of characters would meet it."""
    for end in range(len(text) + 1):
        found = [text[:end].find(word) for word in stop if text[:end].find(word) >= 0]
        if found:
            return text[: min(found)]
    return text


@given(
    st.text("abAB <>#\n", max_size=24), st.lists(st.text("abAB <>#\n", min_size=1, max_size=4), max_size=3)
)
@settings(max_examples=150, deadline=None)
def test_stop_strings_end_an_answer_wherever_tokens_lie(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    pieces, spoken = speak(tokenizer, tokenizer.encode(text), tuple(stop))
    whole = "".join(pieces)
    assert whole == spoken.text
    assert not any(word in whole for word in stop)
    assert whole == text[: len(whole)]
    assert spoken.stopped == any(word in text for word in stop)
    if not spoken.stopped:
        assert whole == text
    else:
        assert any(text[len(whole) :].startswith(word) for word in stop)


def test_one_character_at_a_time_the_first_stop_wins(tokenizer: Tokenizer) -> None:
    text, stop = "one</end>two", ("</end>", "two")
    pieces, _ = speak(tokenizer, [i for c in text for i in tokenizer.encode(c)], stop)
    assert "".join(pieces) == first_stop(text, stop) == "one"


def test_text_is_held_back_only_while_it_may_become_a_stop(tokenizer: Tokenizer) -> None:
    spoken = Spoken.begin(tokenizer, ("##!",))
    said = [spoken.push(tokenizer.encode(c)[0]) for c in "a##b##!c"]
    assert said == ["a", "", "", "##b", "", "", "", ""]
    assert spoken.stopped and spoken.text == "a##b" and spoken.finish() == ""


def test_a_half_stop_at_the_end_is_text(tokenizer: Tokenizer) -> None:
    pieces, spoken = speak(tokenizer, tokenizer.encode("yes #"), ("##",))
    assert "".join(pieces) == "yes #" and not spoken.stopped


@given(st.text(max_size=12))
@settings(max_examples=80, deadline=None)
def test_characters_of_many_bytes_come_whole(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces, _ = speak(tokenizer, ids, ())
    assert "".join(pieces) == tokenizer.decode(ids)
    pieces, _ = speak(tokenizer, ids, ("\ufffe",))
    assert "".join(pieces) == tokenizer.decode(ids) or "\ufffe" in text
