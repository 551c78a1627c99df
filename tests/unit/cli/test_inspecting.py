"""`inspect` and `check`: tables for people, JSON for programs, exit status 1 where something is wrong."""

import json
from pathlib import Path

import pytest

from heliostat.build import read_family, write_family
from tests.unit.cli.conftest import Heliostat


def test_inspect_shows_modules_members_sharing_and_memory(heliostat: Heliostat, tiny_family: Path) -> None:
    shown = heliostat("inspect", tiny_family).stdout
    for said in ("math.own", "adapter on base", "prefillshare", "4 separate models", "3 copies", "28,192"):
        assert said in shown
    facts = json.loads(heliostat("inspect", tiny_family, "--json").stdout)
    assert [m["name"] for m in facts["members"]] == ["solo", "math", "code", "plan"]


def test_a_sharing_is_one_word_in_a_narrow_terminal(
    heliostat: Heliostat, tiny_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    heliostat("member", "rename", tiny_family, "code", "a-long-member-name")
    shown = heliostat("inspect", tiny_family).stdout
    assert "prefillshare" in shown and "independent" in shown
    assert max(len(line) for line in shown.splitlines() if str(tiny_family) not in line) <= 80


def test_inspect_of_a_new_family_says_what_to_do(heliostat: Heliostat, bare_family: Path) -> None:
    assert "no members yet" in heliostat("inspect", bare_family).stdout


def test_check_is_content_with_a_good_family(heliostat: Heliostat, tiny_family: Path) -> None:
    facts = json.loads(heliostat("check", tiny_family, "--member", "math", "--json").stdout)
    assert facts["ok"] and {"module math.own", "member math"} <= {f["name"] for f in facts["findings"]}
    shown = heliostat("check", tiny_family, "--member", "solo", "--as", "sun").stdout
    assert "solo as sun" in shown


def test_check_finds_a_module_that_changed(heliostat: Heliostat, tiny_family: Path) -> None:
    path = tiny_family / "modules" / "math.own" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(bytes(content))
    result = heliostat("check", tiny_family, status=1)
    assert "NOT OK  module math.own" in result.stdout


def test_check_finds_a_member_tuned_with_other_weights(heliostat: Heliostat, tiny_family: Path) -> None:
    family = read_family(tiny_family)
    data = family.to_json()
    data["members"]["math"]["digests"]["base"] = "0" * 64
    write_family(tiny_family, type(family).from_json(data))
    facts = json.loads(heliostat("check", tiny_family, "--json", status=1).stdout)
    assert [f["name"] for f in facts["findings"] if not f["ok"]] == ["member math"]


def test_check_refuses_wishes_that_mean_nothing(heliostat: Heliostat, tiny_family: Path) -> None:
    assert "did you mean 'icarus'" in heliostat("check", tiny_family, "--as", "icarsu", status=2).stderr
    assert "is for --as SHARING" in heliostat("check", tiny_family, "--data", "x", status=2).stderr
