"""The table at the centre: who writes and speaks where, who shares with whom, and that a table survives its JSON."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heliostat.errors import Refused
from heliostat.family import (
    BASE,
    FORMAT_VERSION,
    NAME,
    PARTS,
    SHARINGS,
    Family,
    Member,
    Module,
    Row,
    Sharing,
    choose,
    own_module_name,
    sharing_named,
)

# Rows

names = st.sampled_from(["a", "b", "c", "d"])
rows = st.builds(
    lambda writer, answers, speaker, first: Row(writer, answers, speaker, writer if first else speaker),
    names,
    names,
    names,
    st.booleans(),
)


def test_a_first_speaker_must_have_read_the_prompt() -> None:
    with pytest.raises(Refused, match=r"first_speaker 'c' is neither .*'a' nor the speaker 'b'"):
        Row("a", "c", "b", "c")


@pytest.mark.parametrize(
    ("sharing", "writers", "speakers"),
    [
        ("independent", "mmm|mm", "mmm"),
        ("sun", "mmm|bb", "mbb"),
        ("prefillshare", "bbm|mm", "mmm"),
        ("icarus", "bbb|bb", "mmm"),
    ],
)
def test_who_writes_and_speaks_by_hand(sharing: str, writers: str, speakers: str) -> None:
    """Three prompt tokens, two answer tokens; who speaks after the last prompt token and after each of the two."""
    row = SHARINGS[sharing].instantiate("m")
    assert [row.writer_at(p, 3)[0] for p in range(5)] == list(writers.replace("|", ""))
    assert [row.speaker_at(p, 3)[0] for p in range(2, 5)] == list(speakers)


@given(row=rows, prompt=st.integers(1, 40), answer=st.integers(1, 40))
def test_the_boundary_parts_prompt_and_answer(row: Row, prompt: int, answer: int) -> None:
    boundary = row.boundary(prompt)
    assert boundary in (prompt - 1, prompt)
    written = [row.writer_at(p, prompt) for p in range(prompt + answer)]
    assert written == [row.prompt_writer] * boundary + [row.answer_writer] * (prompt + answer - boundary)
    spoken = [row.speaker_at(p, prompt) for p in range(prompt - 1, prompt + answer)]
    assert spoken == [row.first_speaker, *[row.speaker] * answer]
    # Who speaks somewhere has either written there or reads a cache that somebody else writes.
    for place, speaker in enumerate(spoken, start=prompt - 1):
        assert speaker == written[place] or (row.two_rows and place >= boundary)


@given(row=rows)
def test_what_follows_from_a_row(row: Row) -> None:
    parts = {getattr(row, part) for part in PARTS}
    assert set(row.modules) == parts and len(row.modules) == len(parts)
    assert row.alone == (len(parts) == 1)
    assert row.two_rows == (row.answer_writer != row.speaker)
    assert row.answers_become_prompts == (row.writer_at(0, 5) == row.writer_at(9, 5))


@pytest.mark.parametrize(
    ("sharing", "two_rows", "reused"),
    [
        ("independent", False, True),
        ("sun", False, False),
        ("prefillshare", False, False),
        ("icarus", True, True),
    ],
)
def test_what_each_sharing_comes_to(sharing: str, two_rows: bool, reused: bool) -> None:
    row = SHARINGS[sharing].instantiate("m.own")
    assert (row.two_rows, row.answers_become_prompts) == (two_rows, reused)
    assert set(row.modules) <= {"m.own", BASE} and row.alone == (sharing == "independent")


# Sharings


def test_frozen_parts_are_replaced_by_name() -> None:
    sun = SHARINGS["sun"]
    assert sun.instantiate("m", {"speaker": "q"}) == Row("m", "q", "q", "m")  # one module wrote and spoke
    assert sun.instantiate("m", {"answer_writer": "q"}) == Row("m", "q", "base", "m")
    assert sun.instantiate("m", {"speaker": "q", "answer_writer": "r"}) == Row("m", "r", "q", "m")
    shared = SHARINGS["prefillshare"].instantiate("m", {"prompt_writer": "q"})
    assert shared == Row("q", "m", "m", "m")
    both = {"prompt_writer": "q", "answer_writer": "q"}
    assert SHARINGS["icarus"].instantiate("m", both) == Row("q", "q", "m", "m")


@pytest.mark.parametrize(
    ("sharing", "part"),
    [("independent", "speaker"), ("sun", "prompt_writer"), ("icarus", "speaker"), ("sun", "reader")],
)
def test_the_members_own_parts_are_not_replaced(sharing: str, part: str) -> None:
    with pytest.raises(Refused, match=f"^{part}: not a frozen part"):
        SHARINGS[sharing].instantiate("m", {part: "q"})


def test_a_sharing_nobody_has_named_yet_needs_no_other_code() -> None:
    late = Sharing(Row("base", "base", "own", "base"), shared="", choose_when="", price="")
    row = late.instantiate("m")
    assert [row.speaker_at(p, 3) for p in (2, 3)] == ["base", "m"]
    assert {row.writer_at(p, 3) for p in range(9)} == {"base"} and row.two_rows


def test_misspelled_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(
        Refused, match=r"no sharing 'icarsu' \(did you mean 'icarus'\?\); there is: icarus, ind"
    ):
        sharing_named("icarsu")
    with pytest.raises(Refused, match=r"no lamp 'zzz'; there is: none yet"):
        choose("zzz", {}, what="lamp")
    assert sharing_named("sun") is SHARINGS["sun"]


# Families


def module(name: str, base: str | None = None) -> Module:
    return Module(name, f"modules/{name}", f"digest of {name}", base=base, parameters=7)


def member(name: str, own: str, sharing: str) -> Member:
    return Member(name, SHARINGS[sharing].instantiate(own), sharing)


@pytest.fixture
def family() -> Family:
    """solo and math are full, code and plan are adapters; twin speaks with math's module."""
    full, adapters = (module(BASE), module("solo.own"), module("math.own")), ("code.own", "plan.own")
    modules = {m.name: m for m in (*full, *(module(name, BASE) for name in adapters))}
    made = (
        member("solo", "solo.own", "independent"),
        member("math", "math.own", "sun"),
        member("code", "code.own", "prefillshare"),
        member("plan", "plan.own", "icarus"),
        member("twin", "math.own", "icarus"),
    )
    return Family(modules, {m.name: m for m in made}, "digest of the tokenizer")


def test_a_row_by_member_or_by_module(family: Family) -> None:
    assert family.row("math") == Row("math.own", BASE, BASE, "math.own")
    assert family.row(BASE).alone and family.row("math.own").modules == ("math.own",)
    with pytest.raises(Refused, match=r"no member 'mth' \(did you mean 'math'\?\)"):
        family.row("mth")
    with pytest.raises(Refused, match=r"no module 'mth.own'"):
        family.module("mth.own")


def test_partners_are_those_whose_part_runs_on_the_same_weights(family: Family) -> None:
    """Adapters of one base count as the base: they go through one pass."""
    assert family.partners("plan") == {
        "prompt_writer": ("code", "twin"),
        "answer_writer": ("math", "code", "twin"),
        "speaker": ("math", "code"),
    }
    assert family.partners("solo") == {"prompt_writer": (), "answer_writer": (), "speaker": ()}
    assert family.partners("twin")["speaker"] == ()
    assert family.users(BASE) == ("math", "code", "plan", "twin") and family.users("plan.own") == ("plan",)
    assert family.module("plan.own").weights == BASE and family.module("math.own").weights == "math.own"


def test_a_removed_member_takes_only_what_nobody_else_uses(family: Family) -> None:
    assert family.own_modules("plan") == ("plan.own",)
    assert family.own_modules("math") == family.own_modules("twin") == ()
    without = family.without_member("math")
    assert "math.own" in without.modules and without.own_modules("twin") == ("math.own",)
    emptied = without
    for name in tuple(without.members):
        emptied = emptied.without_member(name)
    assert (list(emptied.modules), dict(emptied.members)) == ([BASE], {})
    assert emptied.tokenizer == family.tokenizer and "math" in family.members  # the first one is as it was
    with pytest.raises(Refused, match="no member 'gone'"):
        family.without_member("gone")


def test_weights_that_another_members_adapter_rides_on_do_not_go(family: Family) -> None:
    riding = family.without_member("twin").with_module(module("rider.own", "math.own"))
    riding = riding.with_member(member("rider", "rider.own", "independent"))
    assert riding.own_modules("math") == ()
    assert "math.own" in riding.without_member("math").modules
    assert riding.without_member("rider").own_modules("math") == ("math.own",)


def test_renaming_changes_one_name_and_no_order(family: Family) -> None:
    renamed = family.with_member_renamed("math", "sums", folder="fam")
    assert list(renamed.members) == ["solo", "sums", "code", "plan", "twin"]
    assert renamed.member("sums") == Member("sums", family.row("math"), "sun")
    assert renamed.modules == family.modules
    for old, new in (("gone", "sums"), ("math", "code"), ("math", "code.own"), ("math", "../x")):
        with pytest.raises(Refused):
            family.with_member_renamed(old, new, folder="fam")


@pytest.mark.parametrize("name", ["", "-x", ".x", "a b", "a/b", "..", "ä", "a\n", "x" * 65])
def test_malformed_names_are_refused(name: str, family: Family) -> None:
    with pytest.raises(Refused, match="no member name: letters, digits"):
        family.free_name(name, folder="fam")


def test_taken_names_are_refused(family: Family) -> None:
    with pytest.raises(Refused, match=r"already a member 'math'.*heliostat member rm 'my fam' math$"):
        family.free_name("math", folder="my fam")
    with pytest.raises(Refused, match=r"already a member 'math'.*heliostat member rm fam math$"):
        family.with_member_renamed("solo", "math", folder="fam")
    with pytest.raises(Refused, match="'base' is the name of a module"):
        family.free_name("base", folder="fam")
    assert family.free_name("x" * 64, folder="fam") == "x" * 64


@given(st.from_regex(NAME, fullmatch=True), st.integers(0, 4))
def test_own_modules_get_free_names(name: str, taken: int) -> None:
    names: list[str] = []
    for _ in range(taken + 1):
        names.append(own_module_name(name, names))
    assert names[0] == f"{name}.own" and len(set(names)) == taken + 1


def test_what_a_family_cannot_be(family: Family) -> None:
    with pytest.raises(Refused, match=r"'second' is an adapter on the adapter 'plan.own'"):
        family.with_module(module("second", "plan.own"))
    with pytest.raises(Refused, match="no module 'nowhere'"):
        family.with_module(module("second", "nowhere"))
    with pytest.raises(Refused, match=r"no module 'new.own'"):
        family.with_member(member("new", "new.own", "sun"))


@pytest.mark.parametrize("path", ["", ".", "/etc", "..", "modules/../../x", "../fam2"])
def test_modules_lie_inside_the_family(path: str) -> None:
    with pytest.raises(Refused, match="no folder inside the family"):
        Module("m", path, "d")


# JSON

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
labels = st.from_regex(NAME, fullmatch=True)
facts = st.dictionaries(
    words, st.none() | st.booleans() | st.integers() | words | st.lists(words, max_size=2)
)


@st.composite
def families(draw: st.DrawFn) -> Family:
    modules = {BASE: Module(BASE, BASE, draw(words), parameters=draw(st.integers(0)))}
    for name in draw(st.lists(labels.filter(lambda n: n != BASE), max_size=4, unique=True)):
        base = draw(st.sampled_from([None, BASE]))
        quantization = draw(st.none() | words)
        modules[name] = Module(name, f"modules/{name}", draw(words), base, quantization, draw(st.integers(0)))
    some = st.sampled_from(sorted(modules))
    members = {}
    for name in draw(st.lists(labels, max_size=4, unique=True)):
        writer, speaker = draw(some), draw(some)
        row = Row(writer, draw(some), speaker, draw(st.sampled_from([writer, speaker])))
        digests = {n: modules[n].digest for n in row.modules}
        members[name] = Member(name, row, draw(words), digests, draw(facts), draw(facts))
    return Family(modules, members, draw(words))


@given(families())
def test_a_family_survives_its_json(family: Family) -> None:
    text = json.dumps(family.to_json())
    again = Family.from_json(json.loads(text))
    assert again == family
    assert list(again.modules) == list(family.modules) and list(again.members) == list(family.members)
    assert json.dumps(again.to_json()) == text


def spoiled(family: Family, *path: str, value: Any = None) -> dict[str, Any]:
    """The family's JSON with one thing in it replaced, or taken out (None)."""
    data: dict[str, Any] = json.loads(json.dumps(family.to_json()))
    place = data
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format_version",), None, "has format_version None"),
        (
            ("format_version",),
            FORMAT_VERSION + 1,
            f"has format_version 2; this heliostat reads {FORMAT_VERSION}",
        ),
        (("tokenizer",), None, "not a heliostat family: 'tokenizer'"),
        (("modules",), None, "not a heliostat family: 'modules'"),
        (("modules",), [1], "not a heliostat family"),
        (("modules", "math.own", "digest"), None, "not a heliostat family.*digest"),
        (("modules", "math.own", "colour"), "red", "not a heliostat family.*colour"),
        (("modules", "math.own", "path"), "../../home", "no folder inside the family"),
        (("modules", "math.own", "path"), 5, "not a heliostat family"),
        (("modules", "math.own"), None, r"no module 'math.own'"),
        (("modules", "plan.own", "base"), "code.own", "an adapter on the adapter"),
        (("members", "math", "row"), None, "not a heliostat family: 'row'"),
        (("members", "math", "row", "speaker"), None, "not a heliostat family.*speaker"),
        (("members", "math", "row", "speaker"), ["base"], "not a heliostat family"),
        (("members", "math", "row", "first_speaker"), "plan.own", "neither the prompt_writer"),
        (("members", "math"), "sun", "not a heliostat family"),
    ],
)
def test_a_damaged_table_is_refused_by_name(
    family: Family, path: tuple[str, ...], value: Any, message: str
) -> None:
    with pytest.raises(Refused, match=message):
        Family.from_json(spoiled(family, *path, value=value))
