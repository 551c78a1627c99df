"""Which vLLM server holds which weights and adapters, and what cannot be laid out."""

import pytest

from heliostat.errors import Refused
from heliostat.family import Family, Module, Row
from heliostat.serve.cluster import DECODE, PREFILL, Cluster, Place, Terms, laid_out
from heliostat.serve.http_launching import key_of
from heliostat.serve.http_layout import groups_of, servers_of, with_modules


def module(name: str, base: str | None = None) -> Module:
    return Module(name=name, path=name, digest=f"digest of {name}", base=base)


FAMILY = Family(
    {m.name: m for m in (module("base"), module("f"), module("g"), module("a", "base"), module("b", "base"))},
    {},
    "t",
)
OWN_PROMPT = Row("f", "base", "base", "f")
OWN_ANSWER = Row("base", "a", "a", "a")
OWN_VOICE = Row("base", "base", "b", "b")
ALONE = Row("base", "base", "base", "base")


def vllm(prefill: int, decode: int) -> Cluster:
    return laid_out(prefill=prefill, decode=decode, engine="vllm")


def test_sets_of_weights_are_dealt_out_among_servers() -> None:
    rows = {"x": OWN_PROMPT, "y": OWN_ANSWER}
    made = with_modules(vllm(3, 1), FAMILY, rows)
    assert {p.name: p.modules for p in made.places} == {
        "prefill-0": ("f",),
        "prefill-1": ("base",),
        "prefill-2": ("f",),
        "decode-0": ("base", "a"),
    }
    found = servers_of(made, FAMILY, rows)
    assert (found["decode-0"].weights, found["decode-0"].adapters, found["decode-0"].two_streams) == (
        "base",
        ("a",),
        False,
    )
    assert found["prefill-0"].modules == ("f",)


def test_who_only_speaks_has_a_server_of_two_streams() -> None:
    groups = groups_of(FAMILY, {"v": OWN_VOICE, "y": OWN_ANSWER, "base": ALONE}, DECODE)
    assert groups == {("base", True): ("base", "b"), ("base", False): ("a", "base")}


def test_the_base_alone_is_at_home_where_others_only_speak() -> None:
    rows = {"v": OWN_VOICE, "base": ALONE}
    assert groups_of(FAMILY, rows, DECODE) == {("base", True): ("base", "b")}
    assert groups_of(FAMILY, rows, PREFILL) == {("base", False): ("base",)}
    (server,) = servers_of(
        Cluster((Place(name="d", modules=("base", "b"), roles=("decode",)),)), FAMILY, rows
    ).values()
    assert server.two_streams and server.adapters == ("b",)


def test_answers_to_others_prompts_stay_away_from_two_streams() -> None:
    """Those find their pages again by tokens, and would take what another module wrote."""
    assert len(groups_of(FAMILY, {"v": OWN_VOICE, "x": OWN_PROMPT}, DECODE)) == 2


def test_too_few_servers_are_refused_with_the_numbers() -> None:
    rows = {"x": OWN_PROMPT, "z": Row("g", "base", "base", "g"), "y": OWN_ANSWER}
    with pytest.raises(
        Refused, match="3 sets of weights of role prefill .f, g, base., .*there are 2 workers"
    ):
        with_modules(vllm(2, 1), FAMILY, rows)


def test_a_server_of_two_sets_of_weights_is_refused() -> None:
    cluster = Cluster((Place(name="p", modules=("f", "base"), roles=("prefill",)),))
    with pytest.raises(Refused, match="'p' would host f, base, of 2 sets of weights"):
        servers_of(cluster, FAMILY, {})


def test_a_server_that_would_write_and_only_speak_is_refused() -> None:
    rows = {"v": OWN_VOICE, "y": OWN_ANSWER}
    places = (
        Place(name="p", modules=("base",), roles=("prefill",)),
        Place(name="d", modules=("base", "a", "b"), roles=("decode",)),
    )
    with pytest.raises(
        Refused, match="'d': member 'v' speaks what another module writes, 'y' writes for itself"
    ):
        servers_of(Cluster(places), FAMILY, rows)


def test_two_writers_need_two_servers() -> None:
    both = Cluster((Place(name="w", modules=("base", "a")),))
    with pytest.raises(Refused, match="'base' writes its prompts and 'a' its answers"):
        servers_of(both, FAMILY, {"y": OWN_ANSWER})
    servers_of(both, FAMILY, {"base": ALONE})


def test_a_speaker_with_weights_of_its_own_is_for_the_embedded_engine() -> None:
    with pytest.raises(Refused, match="embedded engine runs any two modules"):
        groups_of(FAMILY, {"v": Row("base", "base", "f", "f")}, DECODE)


def test_places_that_name_modules_keep_them() -> None:
    places = (
        Place(name="p", spawn="vllm", modules=("f",), roles=("prefill",)),
        Place(name="q", spawn="vllm", roles=("prefill",)),
        Place(name="d", spawn="vllm", roles=("decode",)),
    )
    made = with_modules(Cluster(places), FAMILY, {"x": OWN_PROMPT, "y": OWN_ANSWER})
    assert [p.modules for p in made.places] == [("f",), ("base",), ("base", "a")]


def test_the_key_of_servers_comes_from_the_environment_or_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_of(Terms()) == ""
    monkeypatch.setenv("SOME_KEY", "k")
    assert key_of(Terms(key_env="SOME_KEY")) == "k"
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(Refused, match="'SOME_KEY', and no such variable is set here"):
        key_of(Terms(key_env="SOME_KEY"))
