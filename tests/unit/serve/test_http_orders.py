"""Orders as completions, completions as tokens, and what of an order cannot be carried."""

from typing import Any

import msgspec
import pytest

from heliostat.engine.request import Sampling
from heliostat.family import Row
from heliostat.serve.http_orders import Choice, Logprobs, beyond, completion, decoded, sampled_of
from heliostat.serve.protocol import Order, Sampled

ROW = Row("own", "base", "base", "own")


def order(answer: tuple[int, ...] = (), schema: str | None = None, **wish: object) -> Order:
    sampling = Sampling(**{"max_tokens": 8, **wish})  # type: ignore[arg-type]
    return Order(
        id="o", row=ROW, digests={}, prompt=(1, 2, 3), answer=answer, sampling=sampling, schema=schema
    )


def body(asked: Order, **more: object) -> dict[str, object]:
    facts = {"model": "m", "prompt": (1, 2, 3), "most": 5, "eos": (7, 9), "stream": True, **more}
    return completion(asked, **facts)  # type: ignore[arg-type]


def test_every_wish_is_said_and_nothing_is_left_to_the_server() -> None:
    found = body(
        order(
            temperature=0.5, top_p=0.9, top_k=4, min_p=0.1, min_tokens=3, logprobs=2, logit_bias={5: -100.0}
        )
    )
    assert (found["temperature"], found["top_p"], found["top_k"], found["min_p"]) == (0.5, 0.9, 4, 0.1)
    assert (found["max_tokens"], found["min_tokens"], found["stop_token_ids"]) == (5, 3, [7, 9])
    assert (found["logprobs"], found["return_tokens_as_token_ids"]) == (2, True)
    assert found["logit_bias"] == {"5": -100.0} and found["repetition_penalty"] == 1.0
    assert found["ignore_eos"] is True and "stop" not in found, (
        "end tokens are said by id, stop strings are ours"
    )


def test_end_tokens_are_not_said_where_they_do_not_end() -> None:
    assert body(order(ignore_eos=True))["stop_token_ids"] == []


def test_a_schema_goes_along_and_ends_by_itself() -> None:
    found = body(order(schema='{"type": "object"}'))
    assert found["structured_outputs"] == {"json": {"type": "object"}} and found["ignore_eos"] is False


def test_noise_is_another_where_an_answer_is_gone_on_with() -> None:
    seeds = [
        body(order(answer, temperature=1.0, seed=3, choice=choice))["seed"]
        for answer, choice in (((), 0), ((), 1), ((5,), 0), ((), 0))
    ]
    assert len(set(seeds)) == 3 and seeds[0] == seeds[3]
    assert all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in seeds)
    assert "seed" not in body(order(seed=3)), "a greedy answer needs no generator of its own"


def test_fewer_tokens_are_held_back_where_some_were_said() -> None:
    assert body(order((5, 6), min_tokens=3))["min_tokens"] == 1
    assert body(order((5, 6), min_tokens=8), most=1)["min_tokens"] == 1


@pytest.mark.parametrize("wish", [{"presence_penalty": 0.1}, {"frequency_penalty": -0.1}])
def test_penalties_forget_what_another_server_said(wish: dict[str, Any]) -> None:
    assert beyond(order(**wish), said=0) == "" == beyond(order(), said=3)
    assert "embedded engine" in beyond(order(**wish), said=1)
    assert beyond(order(max_tokens=1, **wish), said=1) == "", "nothing more is said"


def test_a_schema_cannot_be_gone_on_with() -> None:
    assert "JSON schema" in beyond(order(schema="{}"), said=1) and not beyond(order(schema="{}"), said=0)


def test_tokens_and_their_chances_are_read_from_an_event() -> None:
    event = decoded(
        b'{"id": "x", "choices": [{"index": 0, "text": "ab", "token_ids": [3, 4], "logprobs": {"tokens": ["token_id:3", '
        b'"token_id:4"], "token_logprobs": [-0.5, -1.0], "top_logprobs": [{"token_id:3": -0.5, "token_id:9": -0.1}, null], '
        b'"text_offset": [0, 1]}, "finish_reason": null}]}'
    )
    assert sampled_of(event.choices[0]) == [Sampled(3, -0.5, ((9, -0.1), (3, -0.5))), Sampled(4, -1.0)]
    assert sampled_of(Choice()) == []


def test_what_makes_no_sense_is_not_taken_for_tokens() -> None:
    with pytest.raises(ValueError, match="2 tokens with 1"):
        sampled_of(Choice(token_ids=[1, 2], logprobs=Logprobs(token_logprobs=[0.0])))
    with pytest.raises(msgspec.DecodeError):
        decoded(b'{"choices": [{"token_ids": ["1"]}]}')
