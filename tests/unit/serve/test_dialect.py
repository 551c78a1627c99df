"""What a request may say: no number and no text comes through that a message to a worker cannot hold."""

import json

import pytest

from heliostat.serve.dialect import TextAsking, parse
from heliostat.serve.trouble import Trouble

HUGE = 2**70


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"seed": HUGE}, "seed"),
        ({"seed": -HUGE}, "seed"),
        ({"top_k": HUGE}, "top_k"),
        ({"max_tokens": HUGE}, "max_tokens"),
        ({"prompt": [1, HUGE]}, "prompt.1"),
        ({"prompt": [[1], [HUGE]]}, "prompt.1.0"),
        ({"stop": "\ud800"}, "stop"),
        ({"stop": ["a", "\udfff"]}, "stop"),
        ({"logit_bias": {str(HUGE): 1.0}}, "logit_bias"),
    ],
)
def test_what_no_message_can_hold_is_refused_by_name(fields: dict[str, object], param: str) -> None:
    body = json.dumps({"model": "base", "prompt": "a", **fields}).encode()
    with pytest.raises(Trouble) as trouble:
        parse(TextAsking, body)
    assert trouble.value.status == 400 and (trouble.value.param or "").startswith(param)


def test_whole_pairs_and_the_largest_numbers_come_through() -> None:
    body = json.dumps({"model": "base", "prompt": "\U0001f600", "stop": "\\ud800", "seed": 2**64 - 1})
    found, unknown = parse(TextAsking, body.encode())
    assert (found.prompt, found.stop, found.seed, unknown) == ("\U0001f600", "\\ud800", 2**64 - 1, [])
