"""Systems are tables: rows, weights and names, and what is refused."""

import pytest

from heliostat.bench.systems import SYSTEMS, counts, member_names, rank, systems_named
from heliostat.errors import Refused
from heliostat.family import SHARINGS


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_a_system_is_its_sharing_with_a_module_for_each_member(name: str) -> None:
    system = SYSTEMS[name]
    rows = system.rows(("m1", "m2"))
    assert rows == {m: SHARINGS[system.sharing].instantiate(system.own(m)) for m in ("m1", "m2")}
    assert system.own("m1") != system.own("m2")


def test_whole_models_run_on_their_own_weights_and_adapters_on_the_base() -> None:
    assert SYSTEMS["independent"].case(["m1"]).weights == {}
    assert SYSTEMS["multilora"].case(["m1"]).weights == {"m1.all": "base"}
    assert SYSTEMS["icarus"].case(["m1"]).weights == {"m1.query_side": "base"}
    assert SYSTEMS["prefillshare"].case(["m1"]).weights == {}


def test_every_sharing_has_a_system() -> None:
    assert {system.sharing for system in SYSTEMS.values()} == set(SHARINGS)


@pytest.mark.parametrize("names", ["independent", "", "sun,sun"])
def test_a_comparison_takes_two_systems_each_once(names: str) -> None:
    with pytest.raises(Refused, match="two systems or more"):
        systems_named(names)


def test_an_unknown_system_is_refused_by_name() -> None:
    with pytest.raises(Refused, match=r"no system 'icarsu' \(did you mean 'icarus'"):
        systems_named("independent,icarsu")


def test_members_are_counted_and_refused_by_value() -> None:
    assert counts("2,4,2") == [2, 4] and member_names(2) == ("m1", "m2")
    for text, words in (("0", "members is 0"), ("65", "members is 65"), ("two", "members is 'two'")):
        with pytest.raises(Refused, match=words):
            counts(text)


@pytest.mark.parametrize(("width", "r"), [(48, 8), (384, 16), (768, 32), (4096, 128)])
def test_ranks_are_the_papers_scaled(width: int, r: int) -> None:
    assert rank(width) == r
