"""Names and versions: who answers whom, exact shares, and what must stay loaded."""

from collections import Counter

import pytest

from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.serve.roster import Roster, Unknown, Version, family_name, module_name


def version(member: str = "math", digest: str = "1" * 64) -> Version:
    base, own = module_name("base", "b" * 64), module_name(f"{member}.own", digest)
    digests = {base: "b" * 64, own: digest}
    return Version(member, Row(own, base, base, own), digests, member)


@pytest.fixture
def roster() -> Roster:
    made = Roster()
    made.add(version())
    made.add(version("code"))
    return made


def test_names_carry_the_digest_and_come_back() -> None:
    assert module_name("math.own", "0123456789abcdef") == "math.own#0123456789ab"
    assert family_name("math.own#0123456789ab") == "math.own"
    assert family_name("math.own") == "math.own"


def test_a_member_answers_to_its_name_and_its_version(roster: Roster) -> None:
    assert roster.choose("math") == roster.find("math") == roster.find("math@v1")
    assert list(roster.public()) == ["math", "code"]


@pytest.mark.parametrize("name", ["", "maths", "math@", "math@v2", "math@v1@v1", "@v1", "nobody@v1", "own"])
def test_a_name_that_means_nobody_is_unknown_never_another(roster: Roster, name: str) -> None:
    for ask in (roster.find, roster.choose):
        with pytest.raises(Unknown):
            ask(name)


@pytest.mark.parametrize(("share", "of_hundred"), [(0.1, 10), (0.01, 1), (1 / 3, 33), (0.5, 50), (1, 100)])
def test_a_canary_gets_exactly_its_share(roster: Roster, share: float, of_hundred: int) -> None:
    tried = roster.try_out(version(digest="2" * 64), share=share)
    assert tried.name == "math@v2" and roster.find("math@v2") == tried
    counts = Counter(roster.choose("math").name for _ in range(100))
    assert counts["math@v2"] == of_hundred
    assert {roster.choose("code").name for _ in range(9)} == {"code@v1"}
    assert {roster.choose("math@v1").name for _ in range(9)} == {"math@v1"}
    assert set(roster.public()) == {"math", "code", "math@v1", "math@v2"}


def test_looking_a_name_up_takes_no_turn(roster: Roster) -> None:
    roster.try_out(version(digest="2" * 64), share=0.5)
    for _ in range(3):
        roster.find("math")
    assert [roster.choose("math").number for _ in range(4)] == [1, 2, 1, 2]


def test_the_same_canary_again_only_changes_its_share(roster: Roster) -> None:
    first = roster.try_out(version(digest="2" * 64), share=0.1)
    assert roster.try_out(version(digest="2" * 64), share=0.5) == first
    assert roster.seat("math").share == 0.5


def test_a_canary_is_called_off_or_rolled_out(roster: Roster) -> None:
    old, tried = roster.find("math"), roster.try_out(version(digest="2" * 64), share=0.1)
    roster.call_off("math")
    assert {roster.choose("math") for _ in range(20)} == {old}
    tried = roster.try_out(version(digest="3" * 64), share=0.1)
    assert roster.roll(version(digest="3" * 64)) == tried
    assert {roster.choose("math").name for _ in range(20)} == {"math@v3"}
    with pytest.raises(Unknown):
        roster.find("math@v1")


def test_what_is_refused(roster: Roster) -> None:
    with pytest.raises(Refused, match="served already"):
        roster.add(version())
    with pytest.raises(Refused, match="nothing to try"):
        roster.try_out(version(), share=0.1)
    with pytest.raises(Refused, match="share is 1.5"):
        roster.try_out(version(digest="2" * 64), share=1.5)
    with pytest.raises(Refused, match="no canary"):
        roster.call_off("math")
    for act in (roster.drop, roster.call_off):
        with pytest.raises(Unknown):
            act("nobody")
    with pytest.raises(Unknown):
        roster.roll(version("nobody"))


def test_a_version_in_flight_keeps_its_modules_until_it_has_ended(roster: Roster) -> None:
    old = roster.choose("math")
    roster.begin(old)
    new = roster.roll(version(digest="2" * 64))
    assert set(old.row.modules) | set(new.row.modules) <= roster.needed()
    assert roster.flying(old) == roster.all_flying == 1
    roster.end(old)
    assert "math.own#" + "1" * 12 not in roster.needed() and "base#" + "b" * 12 in roster.needed()
    roster.drop("math")
    assert not any(name.startswith("math.own") for name in roster.needed())


def test_numbers_are_never_used_twice(roster: Roster) -> None:
    roster.drop("math")
    assert roster.add(version()).name == "math@v2"


def test_a_fingerprint_tells_weights_and_parts_apart() -> None:
    one, other = version(), version(digest="2" * 64)
    base, own = one.digests
    turned = Version("math", Row(base, own, own, own), one.digests, "math")
    assert len({one.fingerprint, other.fingerprint, turned.fingerprint}) == 3
