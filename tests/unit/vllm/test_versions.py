"""Versions of vLLM: those in range pass, all others are refused with what to do."""

import pytest

from heliostat.errors import Refused
from heliostat.vllm.versions import FIRST, LAST, numbers, refuse_missing, refuse_unsupported


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.32.1rc2", "0.30"])
def test_a_version_in_range_passes(version: str) -> None:
    refuse_unsupported(version)


@pytest.mark.parametrize("version", ["0.25.9", "0.33.0", "1.0.0", "0.3.2", "", "dev"])
def test_any_other_is_refused_with_the_way_out(version: str) -> None:
    with pytest.raises(Refused, match="0.26 to 0.32.*--engine vllm"):
        refuse_unsupported(version)


def test_the_range_is_one() -> None:
    assert FIRST < LAST == numbers("0.32.7")


def test_what_is_missing_is_named() -> None:
    refuse_missing("0.32.0", [])
    with pytest.raises(Refused, match="0.32.0 lacks .*a.b, c.d"):
        refuse_missing("0.32.0", ["a.b", "c.d"])
