"""Sizes and company of a family's members are what their rows say."""

from pathlib import Path

from heliostat.build import read_family
from heliostat.family import BASE, SHARINGS, Family, Member, Module
from heliostat.survey import savings, survey


def family_of(*sharings: str, adapters: bool = False) -> Family:
    """A family of one member for each sharing; the base has 100 parameters, an adapter 7."""
    modules, members = {BASE: Module(BASE, BASE, "d", parameters=100)}, {}
    for number, sharing in enumerate(sharings):
        own = f"{number}.own"
        base = BASE if adapters else None
        modules[own] = Module(own, own, "d", base=base, parameters=7 if adapters else 100)
        members[str(number)] = Member(str(number), SHARINGS[sharing].instantiate(own), sharing)
    return Family(modules, members)


def table(family: Family) -> list[tuple[int, int]]:
    return [(s.separate, s.family) for s in savings(family, size=2, prompt=10, tokens=5)]


def test_each_sharing_saves_where_it_says() -> None:
    # In order: all weights, those that read prompts, those that write answers, copies of a prompt's K,V.
    assert table(family_of(*["independent"] * 3)) == [(600, 600), (600, 600), (600, 600), (30, 30)]
    assert table(family_of(*["sun"] * 3)) == [(600, 800), (600, 600), (600, 200), (30, 30)]
    assert table(family_of(*["prefillshare"] * 3)) == [(600, 800), (600, 200), (600, 600), (30, 10)]
    icarus = family_of(*["icarus"] * 3, adapters=True)
    assert table(icarus) == [(600, 242), (600, 200), (600, 242), (30, 10)]


def test_adapters_rest_on_weights_that_count_once() -> None:
    assert table(family_of("independent", "independent", adapters=True))[0] == (400, 228)


def test_a_family_on_disk(tiny_family: Path) -> None:
    found = survey(tiny_family, read_family(tiny_family))
    assert found.dtype == "float32"
    sizes = {m.name: (m.kind, m.bytes == 4 * m.parameters) for m in found.modules}
    assert sizes["base"] == ("weights", True) and sizes["plan.own"] == ("adapter on base", True)
    assert {m.name: m.users for m in found.modules}["base"] == ("math", "code", "plan")
    company = {m.name: m for m in found.members}
    assert company["code"].one_prompt == ("plan",) and company["code"].one_cache == ()
    assert company["math"].one_pass["speaker"] == ("plan",)
    assert company["solo"].one_pass == {"prompt_writer": (), "answer_writer": (), "speaker": ()}
    # A prompt as long as the model's 256 tokens: 2 (K and V) x 2 layers x 2 heads x 8 wide x 4 bytes a token.
    assert found.savings[-1].separate == 4 * 256 * 2 * 2 * 2 * 8 * 4
    assert found.savings[-1].family == 3 * 256 * 2 * 2 * 2 * 8 * 4


def test_answers_are_continued_from_one_cache_only_where_one_module_writes_all() -> None:
    from heliostat.survey import _member

    family = family_of("icarus", "icarus", "prefillshare")
    found = _member(family, family.member("0"))
    assert (found.one_prompt, found.one_cache) == (("1", "2"), ("1",))
