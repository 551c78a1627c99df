"""A choice while it is spoken: log-probabilities wait for their text, the end token is no part of an answer."""

from typing import Any

import pytest

from heliostat.engine.request import Sampling
from heliostat.family import Row
from heliostat.serve.dispatch_asked import Asked, Open
from heliostat.serve.protocol import Finish, Order, Said, Sampled
from heliostat.serve.speaking import Voice, finite, usage_of
from heliostat.serve.tools import Caller

END = 1


def request(prompt: int = 4, answer: int = 2, cached: int = 0) -> Open:
    row = Row("b", "b", "b", "b")
    order = Order(id="r", row=row, digests={"b": "d"}, prompt=(5,) * prompt, sampling=Sampling())
    return Open(order, Asked(), 0, 0.0, None, answer=[7] * answer, cached_tokens=cached)


def heard(
    *pieces: tuple[str, int, Finish | None], listening: bool = False, every: bool = False
) -> tuple[Voice, list[Any]]:
    voice = Voice(Caller(listening), [END], every)
    found = [
        voice.hear(Said("r", number, Sampled(token, -1.0), text, end))
        for number, (text, token, end) in enumerate(pieces)
    ]
    return voice, found


def test_tokens_without_text_wait_for_it() -> None:
    voice, (nothing, told, last) = heard(("", 7, None), ("ü", 8, None), ("!", 9, "length"))
    assert nothing is None
    assert (told.text, [s.token for s in told.tokens], told.first) == ("ü", [7, 8], True)
    assert (last.text, [s.token for s in last.tokens], last.first, last.offset) == ("!", [9], False, 1)
    assert voice.whole.text == "ü!" and len(voice.whole.tokens) == 3


@pytest.mark.parametrize(("reason", "tokens"), [("stop", [7]), ("length", [7])])
def test_an_end_token_is_not_told(reason: Finish, tokens: list[int]) -> None:
    voice, (_, last) = heard(("a", 7, None), ("", END, reason))
    assert last.reason == reason and last.text == "" and [s.token for s in voice.tokens] == tokens


def test_an_answer_of_nothing_is_told_once() -> None:
    voice, (only,) = heard(("", END, "stop"))
    assert only.first and only.reason == voice.reason == "stop" and voice.whole.text == ""


def test_calls_change_the_reason_only_of_an_answer_that_has_ended() -> None:
    said = '<tool_call>{"name": "f"}</tool_call>'
    for end, reason in (("stop", "tool_calls"), ("length", "length")):
        voice, _ = heard((said, 7, None), ("", END, end), listening=True)  # type: ignore[arg-type]
        assert voice.reason == reason and len(voice.caller.calls) == 1


def test_usage_counts_a_prompt_once() -> None:
    requests = [request(cached=2), request(cached=4), request(prompt=6), request(prompt=6, cached=4)]
    usage = usage_of(requests, choices=2)
    assert usage["prompt_tokens"] == 10 and usage["completion_tokens"] == 8 and usage["total_tokens"] == 18
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}


def test_json_has_no_infinity() -> None:
    assert finite(float("-inf")) == -9999.0 and finite(-0.5) == -0.5


def test_ids_are_all_that_was_chosen_and_each_can_be_told_at_once() -> None:
    pieces: tuple[tuple[str, int, Finish | None], ...] = (("", 7, None), ("ü", 8, None), ("", END, "stop"))
    voice, (nothing, told, last) = heard(*pieces)
    assert nothing is None and told.ids == (7, 8) and last.ids == (END,)
    every, each = heard(*pieces, every=True)
    assert [told.ids for told in each] == [(7,), (8,), (END,)] and [told.first for told in each] == [1, 0, 0]
    # What belongs to a text is told with it: only then its place in the answer is known.
    assert [[token.token for token in told.tokens] for told in each] == [[], [7, 8], []]
    assert voice.whole.ids == every.whole.ids == (7, 8, END) and voice.whole.text == every.whole.text == "ü"


def test_timings_are_told_of_each_answer_and_only_where_asked() -> None:
    assert "heliostat_timings" not in usage_of([request()], choices=1)
    one, other = request(), request()
    one.phases.queue, other.began, other.last = 2.0, 1.0, 4.0
    first, second = usage_of([one, other], choices=2, timings=True)["heliostat_timings"]
    assert first == {"queue": 2.0, "prefill": 0.0, "transfer": 0.0, "decode": 0.0, "total": 0.0}
    assert second["total"] == 3.0
