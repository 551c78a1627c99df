"""Commands that make and change families do so, and say what they did."""

import json
from pathlib import Path

from heliostat.build import read_family
from tests.unit.cli.conftest import Heliostat


def test_init_says_what_it_took(heliostat: Heliostat, tiny_base: Path, tmp_path: Path) -> None:
    assert "llama" in heliostat("init", tmp_path / "a", "--base", tiny_base).stdout
    facts = json.loads(heliostat("init", tmp_path / "b", "--base", tiny_base, "--json").stdout)
    assert facts["parameters"] == 28192
    assert facts["digest"] == read_family(tmp_path / "a").module("base").digest


def test_a_family_is_not_made_twice(heliostat: Heliostat, bare_family: Path, tiny_base: Path) -> None:
    assert "already a family" in heliostat("init", bare_family, "--base", tiny_base, status=2).stderr


def test_export_then_import_gives_the_same_module(heliostat: Heliostat, tiny_family: Path) -> None:
    out = tiny_family.parent / "out"
    facts = json.loads(heliostat("export", tiny_family, "--member", "solo", "--out", out, "--json").stdout)
    assert facts == {"member": "solo", "out": str(out), "alone": True}
    heliostat("import", tiny_family, "--member", "old", "--from", out)
    family = read_family(tiny_family)
    assert family.module("old.own").digest == family.module("solo.own").digest


def test_exporting_half_a_member_says_so(heliostat: Heliostat, tiny_family: Path) -> None:
    result = heliostat("export", tiny_family, "--member", "math", "--out", tiny_family.parent / "out")
    assert "half a member" in result.stderr and "reproduce.py" in result.stdout


def test_members_are_renamed_and_removed(heliostat: Heliostat, tiny_family: Path) -> None:
    heliostat("member", "rename", tiny_family, "math", "sums")
    assert set(read_family(tiny_family).members) == {"solo", "sums", "code", "plan"}
    assert "modules/math.own" in heliostat("member", "rm", tiny_family, "sums").stdout
    assert not (tiny_family / "modules" / "math.own").exists()
    assert "did you mean 'plan'" in heliostat("member", "rm", tiny_family, "plam", status=2).stderr
