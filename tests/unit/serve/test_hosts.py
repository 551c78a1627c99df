"""By which names and addresses a server may be asked."""

import pytest

from heliostat.serve.hosts import host_names, is_loopback, knows


def test_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "example.org", ""]))


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("llm.example:8000", True),
        ("LLM.Example", True),
        ("10.0.0.1:80", True),
        ("[::1]:80", True),
        ("llm.example.evil", False),
        ("llm.example:port", False),
        ("", False),
    ],
)
def test_names_are_those_that_were_given_and_addresses_any(host: str, known: bool) -> None:
    assert knows(host_names(["Llm.example"]), host) is known
