"""Which requests a vLLM worker must not run: above all those that it would read with another module."""

from typing import Any

import pytest

from heliostat.vllm import wire
from heliostat.vllm.asked import Settings, wrong
from heliostat.vllm.launch import Hosted, Launch, settings
from heliostat.vllm.wire import Role

W, A, B = "1" * 64, "2" * 64, "3" * 64
OWN = Hosted(name="own", digest=A, folder="/a", rank=8)


def worker(role: Role, **more: Any) -> Settings:
    base = Hosted(name="base", digest=B, folder="/b")
    facts = {"name": "w", "weights": base, "adapters": (OWN,), "zero": "/z", "role": role, "fit": "f", **more}
    return Settings(**settings(Launch(**facts)))


BASE = "base#" + B[:12]
LOADED = wire.load({"do_remote_prefill": True, "do_remote_decode": False, "handle": "h", "fit": "f"}, W, 4)


def code(role: Role, model: str, params: dict[str, Any] | None, count: int, **more: Any) -> str:
    found = wrong(worker(role, **more), model, params, count)
    return "" if found is None else found.code


def test_what_fits_runs() -> None:
    assert code("prefill", BASE, wire.keep(B, 4), 4) == ""
    assert code("prefill", OWN.model, wire.keep(A, 4), 4) == ""
    assert code("decode", BASE, LOADED, 5) == ""
    assert code("decode", BASE, wire.alone(B), 1) == ""
    assert code("both", OWN.model, wire.alone(A), 3) == ""
    assert code("both", OWN.model, None, 3) == ""


def test_another_module_never_reads_a_prompt() -> None:
    for role in ("prefill", "decode", "both"):
        assert code(role, BASE, wire.alone(W), 3) == "module_missing"
    assert code("prefill", BASE, wire.keep(A, 4), 4) == "module_missing"
    assert code("prefill", OWN.model, wire.keep(B, 4), 4) == "module_missing"
    assert code("decode", "other#" + "0" * 12, LOADED, 5) == "module_missing"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_request_of_one_half_says_who_writes(role: Role) -> None:
    assert code(role, BASE, None, 3) == "refused"
    for params in ({"tokens": 3}, {"writer": B}, {"writer": B, "tokens": True}, {"writer": 1, "tokens": 0}):
        assert code(role, BASE, params, 3) == "refused"


def test_counts_must_agree() -> None:
    assert code("prefill", BASE, wire.keep(B, 4), 5) == "refused"
    assert code("decode", BASE, LOADED, 4) == "refused", "the last token is always run"
    assert code("decode", BASE, {**LOADED, "tokens": 0}, 4) == "refused"
    assert code("decode", BASE, {**wire.alone(B), "tokens": 2}, 4) == "refused"


def test_roles_do_their_half_only() -> None:
    assert code("decode", BASE, wire.keep(B, 4), 4) == "refused"
    assert code("both", BASE, wire.keep(B, 4), 4) == "refused"
    assert code("prefill", BASE, LOADED, 5) == "refused"


def test_pages_of_another_make_do_not_fit() -> None:
    assert code("decode", BASE, {**LOADED, "fit": "g"}, 5) == "misfit"
    assert code("decode", BASE, {**LOADED, "fit": "g"}, 5, transfer="nixl") == "misfit"
    other = code("decode", BASE, {**LOADED, "fit": "g"}, 5, transfer="MooncakeConnector")
    assert other == "", "what others say does not tell it: the router compares"


def test_two_streams_take_only_what_they_would_have_written() -> None:
    assert code("decode", OWN.model, LOADED, 5, two_streams=True) == "misfit"
    own = {**LOADED, "writer": B}
    assert code("decode", OWN.model, own, 5, two_streams=True) == ""
    assert code("both", OWN.model, wire.alone(B), 5, two_streams=True) == ""
    assert code("both", OWN.model, wire.alone(A), 5, two_streams=True) == "module_missing"
