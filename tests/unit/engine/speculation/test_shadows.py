"""A draft's page chains: what it read is found again, what it guessed wrongly is not, and nothing leaks."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.engine.page_table import page_key
from heliostat.engine.request import Request, Sampling
from heliostat.engine.speculation.shadows import Shadows
from heliostat.family import Row

SIZE = 3


def shadows(pages: int = 20) -> Shadows:
    return Shadows("small", "digest of small", vocabulary=9, pages=pages, page_size=SIZE)


def asked(name: str, prompt: tuple[int, ...], salt: str = "") -> Request:
    row = Row("own", "base", "base", "own")
    return Request(name, row=row, digests={}, prompt=prompt, sampling=Sampling(), salt=salt)


def check(them: Shadows) -> None:
    """Who holds pages is followed, and what is offered is named by the known tokens that it holds."""
    table = them.table
    held = Counter(page for chain in them.chains for page in chain.pages)
    assert [held[page] for page in range(table.pages)] == table._references
    assert table.available() == table.pages - len(held)
    for chain in them.chains:
        assert len(chain.pages) >= table.pages_for(chain.computed) and chain.computed <= chain.length
        key = b""
        for index in range(chain.computed // SIZE):
            tokens = chain.token_ids(index * SIZE, (index + 1) * SIZE)
            key = page_key(key, writer="digest of small", tokens=tokens, salt=chain.salt)
            published = table._published[chain.pages[index]]
            assert published is None or published.key == key, "a twin of another's stays private"
        for page in chain.pages[chain.computed // SIZE :]:
            assert table._published[page] is None, "nothing else is"


@given(seed=st.integers(0, 10_000), pages=st.integers(2, 24))
def test_they_follow_their_requests_whatever_is_guessed(seed: int, pages: int) -> None:
    dice, them = random.Random(seed), shadows(pages)
    requests: dict[str, Request] = {}
    for number in range(60):
        kind = dice.choice(["new", "draft", "draft", "draft", "read", "end"])
        if kind == "new" or not requests:
            prompt = tuple(dice.randrange(2) for _ in range(dice.randrange(1, 9)))
            requests[f"r{number}"] = asked(f"r{number}", prompt, dice.choice(["", "tenant"]))
            continue
        request = requests[dice.choice(sorted(requests))]
        if kind == "end":
            del requests[request.id]
            them.forget(request.id)
        elif kind == "read":
            request.answer += [dice.randrange(2) for _ in range(dice.randrange(4))]
            shadow = them.follow(request)
            stop = dice.randrange(shadow.chain.computed, request.length + 1)
            if them.make_room(shadow, stop):
                them.read(shadow, stop)
        elif draft(them, request, dice):
            del requests[request.id]
            them.forget(request.id)
        check(them)
    for name in list(requests):
        them.forget(name)
    assert len(them) == 0 and them.table.available() == pages


def draft(them: Shadows, request: Request, dice: random.Random) -> bool:
    """One turn: some tokens are guessed, some of these come true, and one more is said; whether that is the end."""
    shadow, count = them.follow(request), dice.randrange(1, 6)
    assert shadow.chain.answer == request.answer and not shadow.guessed
    if not them.make_room(shadow, request.length + count - 1):
        return False
    guessed = [dice.randrange(2) for _ in range(count)]
    them.read(shadow, request.length)
    them.guess(shadow, guessed[:-1])
    taken, before, said = dice.randrange(count + 1), request.length, len(request.answer)
    request.answer += [*guessed[:taken], dice.randrange(2)]
    if dice.random() < 0.2:
        del request.answer[said + dice.randrange(1, taken + 2) :]  # a stop string ended it
        return True
    shadow = them.follow(request)
    assert before <= shadow.chain.computed <= before + count - 1
    assert shadow.chain.computed >= before + min(taken, count - 1)
    return False


def test_what_begins_alike_is_read_once() -> None:
    them = shadows()
    for name, prompt, salt, found in (
        ("a", (1, 2, 3, 4, 5, 6, 7), "", 0),
        ("b", (1, 2, 3, 4, 5, 6, 8), "", 6),
        ("c", (1, 2, 3, 4, 5, 6, 8), "tenant", 0),
    ):
        shadow = them.follow(asked(name, prompt, salt))
        assert shadow.chain.computed == found
        assert them.make_room(shadow, 7)
        them.read(shadow, 7)


def test_who_finds_no_room_gives_all_up_and_comes_back() -> None:
    them = shadows(pages=3)
    first, second = asked("a", (1,) * 6), asked("b", (2,) * 9)
    assert them.make_room(them.follow(first), 6)
    assert not them.make_room(them.follow(second), 9)
    assert len(them) == 1 and them.table.available() == 1
    them.forget("a")
    assert them.make_room(them.follow(second), 9)


def test_another_request_of_the_same_name_begins_anew() -> None:
    them = shadows()
    shadow = them.follow(asked("a", (1, 2, 3, 4)))
    assert them.make_room(shadow, 4)
    them.read(shadow, 4)
    assert them.follow(asked("a", (2, 2, 2, 2))).chain.computed == 0
    assert len(them) == 1


@pytest.mark.parametrize("strange", [9, 500])
def test_tokens_that_the_draft_does_not_know_are_noticed(strange: int) -> None:
    them = shadows()
    assert them.follow(asked("a", (1, strange))).strange
    request = asked("b", (1, 2))
    assert not them.follow(request).strange
    request.answer.append(strange)
    assert them.follow(request).strange
