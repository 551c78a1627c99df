"""What server and workers say to each other can be sent as bytes, and says the same at the other end."""

from typing import Any, get_args

import msgspec
import pytest

from heliostat.engine.request import Sampling
from heliostat.family import Row
from heliostat.serve.protocol import (
    RETRY,
    STATUS,
    Code,
    Failed,
    Handed,
    Handle,
    Order,
    Parting,
    Said,
    Sampled,
    Spent,
    Stats,
    WorkerSettings,
    content_of,
    no,
)

ORDER = Order(
    id="o",
    member="math",
    row=Row("p#1", "a#2", "a#2", "p#1"),
    digests={"p#1": "x/torch.float32", "a#2": "y/torch.float32"},
    prompt=(1, 2, 3),
    answer=(4,),
    sampling=Sampling(max_tokens=3, stop=("a", "b"), logit_bias={5: -1.5}, logprobs=2),
    schema='{"type":"object"}',
    salt="tenant",
    seconds=1.5,
)
HANDLE = Handle(
    order="o",
    worker="w",
    incarnation="i",
    fit="f",
    content=content_of(ORDER),
    store="s",
    tokens=3,
    pages=(7,),
    generations=(2**50,),
    digests=(b"\x00\xff",),
    lease=30.0,
)
SAID = Said("o", 1, Sampled(7, -0.5, ((7, -0.5), (8, -1.0))), "x", "stop", 2, Spent(waited=0.1))


@pytest.mark.parametrize(
    "message",
    [
        ORDER,
        HANDLE,
        SAID,
        Handed("o", HANDLE, Spent(cached=16), SAID),
        Handed("o", None, Spent()),
        no("o", "busy", "too many"),
        Stats(prefixes=(Parting("a", "b", 1, 2, 3, 4, {"early": 1}),), shared_hits=(("p", "m", 3),)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_a_message_is_the_same_at_the_other_end(message: Any) -> None:
    packed = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(packed, type=type(message)) == message


def test_a_settings_line_is_json_and_has_defaults() -> None:
    settings = WorkerSettings(family="fam", worker="w", incarnation="i", modules={"base": "d"})
    line = msgspec.json.encode(settings)
    assert b"\n" not in line and msgspec.json.decode(line, type=WorkerSettings) == settings
    assert settings.store == "heliostat-i"


@pytest.mark.parametrize("field", ["temperature", "max_tokens"])
def test_a_wish_outside_its_limits_is_no_message(field: str) -> None:
    packed = msgspec.to_builtins(ORDER)
    packed["sampling"][field] = -1
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert(packed, Order)


def test_content_is_what_stands_below_the_boundary() -> None:
    def changed(**what: Any) -> str:
        return content_of(msgspec.structs.replace(ORDER, **what))

    same = content_of(ORDER)
    assert changed(id="other", answer=(), member="x", sampling=Sampling(seed=4)) == same
    assert changed(prompt=(1, 2, 4)) != same and changed(salt="") != same
    assert changed(digests={**ORDER.digests, "p#1": "other"}) != same
    assert changed(digests={**ORDER.digests, "a#2": "other"}) == same
    late = msgspec.structs.replace(ORDER, row=Row("p#1", "a#2", "a#2", "a#2"))
    assert content_of(late) == content_of(msgspec.structs.replace(late, prompt=(1, 2, 9)))


def test_every_failure_has_a_status_and_says_whether_to_ask_again() -> None:
    for code in get_args(Code):
        failed = no("o", code, "why")
        assert isinstance(failed, Failed) and (failed.code, failed.retry) == (code, code in RETRY)
        assert failed.status == STATUS.get(code, 503)
    assert not RETRY & {"refused", "schema", "deadline", "aborted", "member_failed", "misfit"}
