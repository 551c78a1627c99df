"""Every number of the README's results stands in a results file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from heliostat.bench import accuracy_page
from heliostat.bench.readme import BEGIN, END, Figure, Line, number, table, written
from heliostat.errors import Refused
from tests.house.source import ROOT

RESULTS = ROOT / "docs/results"
HEADING = "## Results\n"
NUMERAL = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*")


def results_of(readme: str) -> str:
    """The section of a README that tells results, without the table that is generated."""
    _, found, rest = readme.partition(HEADING)
    assert found, "the README has no such section"
    section = rest.partition("\n## ")[0]
    before, _, others = section.partition(BEGIN)
    return before + others.partition(END)[2]


def scalars(value: Any) -> Iterator[str]:
    """All that stands in a results file, keys too, as text."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from scalars(inner)
    elif isinstance(value, list):
        yield str(len(value))  # so many seeds
        for inner in value:
            yield from scalars(inner)
    else:
        yield str(value)


def known(folder: Path) -> set[str]:
    """Numerals of all results files."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return {numeral for file in files for text in scalars(file) for numeral in NUMERAL.findall(text)}


def unknown(prose: str, folder: Path) -> list[str]:
    """Numerals of a text that stand in no results file."""
    there = known(folder)
    return [numeral for numeral in NUMERAL.findall(prose) if numeral.replace(",", "") not in there]


def accuracy_is_generated(readme: str) -> bool:
    """Whether the table of right answers is the one of its results file."""
    tables = json.loads((RESULTS / "accuracy.json").read_text(encoding="utf-8"))
    rows = "\n".join(accuracy_page.short_rows(tables["tasks"]))
    return rows in readme


def test_the_table_is_what_the_files_say() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert written(readme, RESULTS) == readme, "make it again: python -m heliostat.bench.readme"
    assert len(table(RESULTS)) > 2 and accuracy_is_generated(readme)


def test_what_is_said_beside_the_tables_is_in_a_file() -> None:
    section = results_of((ROOT / "README.md").read_text(encoding="utf-8"))
    begin, _, end = section.partition(accuracy_page.BEGIN)
    prose = begin + end.partition(accuracy_page.END)[2]
    assert unknown(prose, RESULTS) == []


def test_a_number_that_nobody_measured_is_found(tmp_path: Path) -> None:
    (tmp_path / "speed.json").write_text('{"found": [{"ours": 2.0, "theirs": 6.0}], "why": "7 days"}')
    figures = {"gain": Figure("found/0/theirs", "found/0/ours")}
    line = Line("speed", "{gain} as fast", "speed", figures)
    page = written(f"a\n{BEGIN}\nold\n{END}\nb", tmp_path, [line, Line("later", "", "not there yet")])
    assert "| speed | 3.0x as fast | [speed](docs/results/speed.md) |" in page and "later" not in page
    assert written(page.replace("3.0x", "4.0x"), tmp_path, [line]) == page
    for path in ("found/1/ours", "found/0/nobody", "why", "found"):
        with pytest.raises(Refused, match="the results have no"):
            number(json.loads((tmp_path / "speed.json").read_text()), path)
    with pytest.raises(Refused, match="README has no"):
        written("nothing", tmp_path, [line])
    assert unknown("6.0 and 7, but 8", tmp_path) == ["8"]
