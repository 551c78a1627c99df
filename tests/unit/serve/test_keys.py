"""Keys: what a file may say, and that no key is ever shown."""

import json
from pathlib import Path

import pytest

from heliostat.errors import Refused
from heliostat.serve.keys import OPEN, Keys
from heliostat.serve.trouble import Trouble

KEY = "secret-0123456789"


def written(folder: Path, text: str, name: str = "keys.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    yaml = written(tmp_path, f"{KEY}: {{name: alice, members: [math]}}\n")
    same = written(tmp_path, json.dumps({KEY: {"name": "alice", "members": ["math"]}}), "keys.json")
    for path in (yaml, same):
        tenant = Keys.read(path).tenant(f"Bearer {KEY}")
        assert tenant.name == "alice" and not tenant.admin
        assert tenant.may("math") and tenant.may("math@v2") and not tenant.may("code") and not tenant.may("")


def test_all_members(tmp_path: Path) -> None:
    path = written(tmp_path, f"{KEY}: {{name: root, members: all, admin: true}}\n")
    tenant = Keys.read(path).tenant(f"bearer {KEY}")
    assert tenant.may("anything") and tenant.admin and OPEN.may("anything")


@pytest.mark.parametrize(
    "header", ["", KEY, f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY}x", "Bearer \udcff"]
)
def test_any_other_header_is_401_and_quotes_nothing(tmp_path: Path, header: str) -> None:
    keys = Keys.read(written(tmp_path, f"{KEY}: {{name: alice, members: [math]}}\n"))
    with pytest.raises(Trouble) as found:
        keys.tenant(header)
    assert (
        found.value.status == 401 and KEY not in str(found.value) and "Bearer" in found.value.headers.values()
    )


def test_a_salt_is_of_the_name(tmp_path: Path) -> None:
    text = f"{KEY}1: {{name: a, members: all}}\n{KEY}2: {{name: a, members: all}}\n{KEY}3: {{name: b, members: all}}"
    keys = Keys.read(written(tmp_path, text))
    one, renewed, other = (keys.tenant(f"Bearer {KEY}{n}").salt for n in (1, 2, 3))
    assert one == renewed != other and one and other


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Each entry"),
        ("{}", "no key"),
        ("- a", "Each entry"),
        ("short: {name: alice, members: all}", "16 or more"),
        (f"{KEY}: {{members: all}}", "name"),
        (f"{KEY}: {{name: alice}}", "members"),
        (f"{KEY}: {{name: alice, members: some}}", "a list, or all"),
        (f"{KEY}: {{name: alice, members: all, amdin: true}}", "amdin"),
        (f"{KEY}: [unclosed", "no YAML"),
        (f'"{KEY} with space": {{name: alice, members: all}}', "visible"),
    ],
)
def test_a_file_that_is_wrong_is_refused_without_showing_a_key(
    tmp_path: Path, text: str, reason: str
) -> None:
    with pytest.raises(Refused, match=reason) as found:
        Keys.read(written(tmp_path, text))
    assert KEY not in str(found.value)
    with pytest.raises(Refused, match="cannot be read"):
        Keys.read(tmp_path / "gone.yaml")
