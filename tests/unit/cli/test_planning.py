"""`plan` from the command line: tables, JSON, a report, a family's tokenizer and rows, and what is no log."""

import json
from pathlib import Path
from typing import Any

from tests.unit.cli.conftest import Heliostat


def log(folder: Path, lines: list[dict[str, Any]]) -> Path:
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def turns(*roles: str) -> list[dict[str, Any]]:
    """Members of ``roles`` asked about one long context, their role in front of it."""
    return [
        {
            "time": n,
            "member": role,
            "messages": [
                {"role": "system", "content": f"{role}, that is you."},
                {"role": "user", "content": "one two three four five six seven " * 12},
            ],
            "answer_tokens": 8,
            "seconds": 0.5,
        }
        for n, role in enumerate(roles)
    ]


def test_tables_and_a_verdict(heliostat: Heliostat, tmp_path: Path) -> None:
    path = log(tmp_path, turns("math", "code", "plan"))
    said = heliostat("plan", "--logs", path, "--out", tmp_path / "out")
    assert "do not switch as it is; with instructions last it is worth a trial" in said.stdout
    assert "four bytes a token" in said.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["birth"]["commit"] and len(results["counted"]) == 4
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3 and "do not switch as it is" in page


def test_a_family_counts_exactly_and_by_its_rows(
    heliostat: Heliostat, tmp_path: Path, tiny_family_made: Path
) -> None:
    from heliostat.build import load_tokenizer, read_family

    asked = turns("math", "code", "plan")
    found = json.loads(
        heliostat("plan", "--logs", log(tmp_path, asked), "--family", tiny_family_made, "--json").stdout
    )
    tokenizer = load_tokenizer(tiny_family_made, read_family(tiny_family_made))
    exact = sum(len(tokenizer.prompt_ids(line["messages"])) for line in asked)
    assert found["balance"]["prompt_tokens"] == exact
    assert [counted["case"] for counted in found["counted"]][-1] == "this family"
    assert not found["moved"]["guessed"] and set(found["moved"]["roles"]) == {"math", "code", "plan"}
    strange = heliostat("plan", "--logs", log(tmp_path, turns("who")), "--family", tiny_family_made)
    assert "who: no members of" in strange.stderr and "do not switch: there is one member" in strange.stdout


def test_what_is_no_log_is_refused(heliostat: Heliostat, tmp_path: Path) -> None:
    path = log(tmp_path, [{"hello": 1}])
    assert "line 1: lacks 'time'" in heliostat("plan", "--logs", path, status=2).stderr
    assert "no request" in heliostat("plan", "--logs", path, "--skip-bad", status=2).stderr
