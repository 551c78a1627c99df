"""The accuracy table as a page and in the README."""

from pathlib import Path

import pytest

from heliostat.bench import accuracy_page
from heliostat.bench.birth import certificate


def test_the_page_tells_numbers_intervals_and_where_they_come_from(tmp_path: Path) -> None:
    row = {
        "seeds": [0.5, 0.7],
        "points": -1.5,
        "interval": [-3.0, 0.2],
        "against": "LoRA",
        "learning_rate": 0.001,
    }
    table = {"tools": {"base, untuned": {"seeds": [0.1]}, "ICaRus": row | {"history": [[1, 2.0], [2, 1.0]]}}}
    page = accuracy_page.write(tmp_path, table, certificate("the command", seeds=[0, 1], steps=10)).read_text(
        encoding="utf-8"
    )
    assert "| ICaRus | 60.0% | 50.0, 70.0 | -1.5 [-3.0, +0.2] against LoRA | 0.001 |" in page
    assert "the command" in page and (tmp_path / "accuracy-tools.svg").read_text().startswith("<svg")


TABLES = {"tools": {"base, untuned": {"seeds": [0.1]}, "SUN": {"seeds": [0.5, 0.7], "points": -1.5}}}


def test_the_readme_keeps_all_but_its_table(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Name\n<!-- accuracy -->\nold\n<!-- /accuracy -->\nafter\n", encoding="utf-8")
    for _ in range(2):
        accuracy_page.write_readme(readme, TABLES)
        found = readme.read_text(encoding="utf-8")
        assert found.startswith("# Name\n<!-- accuracy -->\n") and found.endswith(
            "<!-- /accuracy -->\nafter\n"
        )
        assert (
            "| SUN | 60.0 % (-1.5) |" in found
            and "| base, untuned | 10.0 % |" in found
            and "old" not in found
        )


def test_a_readme_without_marks_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("text", encoding="utf-8")
    with pytest.raises(AssertionError, match="accuracy"):
        accuracy_page.write_readme(readme, TABLES)
    assert readme.read_text(encoding="utf-8") == "text"
