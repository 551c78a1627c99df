"""What router and workers say about keys and values: params, salts, digests."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import Refused
from heliostat.vllm import wire


def test_what_was_kept_is_loaded_with_who_wrote_it() -> None:
    said = {"do_remote_prefill": True, "do_remote_decode": False, "handle": "h", "writer": "?", "tokens": 1}
    assert wire.load(said, "w", 7) == {**said, "writer": "w", "tokens": 7}


@pytest.mark.parametrize("said", [None, {}, {"failed": "no room"}, {"do_remote_prefill": False}])
def test_nothing_kept_is_refused_with_the_reason(said: dict[str, object] | None) -> None:
    with pytest.raises(Refused, match="no room" if said and "failed" in said else "kept nothing"):
        wire.load(said, "w", 7)


@given(st.text())
def test_a_salt_is_one_that_vllm_takes(tenant: str) -> None:
    salt = wire.salt(tenant)
    assert salt is None if not tenant else re.fullmatch(r"[0-9a-f]{1,128}", str(salt))


@given(st.lists(st.integers(0, 2**40)), st.lists(st.integers(0, 2**40)))
def test_token_ids_are_told_apart(one: list[int], other: list[int]) -> None:
    assert (wire.tokens_digest(one) == wire.tokens_digest(other)) == (one == other)
