"""``heliostat bench workflow`` and ``decode``: wishes that cannot be granted are refused by name, before anything runs."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from heliostat.bench import decode
from heliostat.cli.root import app

TINY = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("workflow --compare independent,other", "no system 'other'"),
        ("workflow --compare independent", "two systems or more"),
        ("workflow --members 0", "members is 0"),
        ("workflow --members many", "members is 'many'"),
        ("workflow --sessions 0", "sessions is 0"),
        ("workflow --workflow waltz", "no workflow 'waltz'"),
        ("workflow --shape 7B", "no shape '7B'; there is: 24M, 100M"),
        ("workflow --pools big", "no pool 'big'"),
        ("workflow --switches 2", "switch is 2"),
        ("workflow --switches often", "switches is 'often'"),
        ("workflow --loads 0,1", "loads are"),
        ("workflow --loads much", "loads is 'much'"),
        ("workflow --popularity normal", "popularity is 'normal'"),
        ("workflow --context 4000", "requests have up to"),
        ("decode --members 2.5", "members is '2.5'"),
        ("decode --running 0", "running is 0"),
        ("decode --shape 7B", "no shape '7B'"),
        ("decode --rounds 0", "rounds is 0"),
        ("decode --quick --members 4,8", "members is '4,8'"),
        ("decode --popularity zipf", "popularity is 'zipf'"),
    ],
)
def test_a_bad_wish_is_refused_by_name(words: str, told: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", *words.split(), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and told in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_quick_comparison_writes_its_page_and_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr("heliostat.bench.stand.SHAPES", {"tiny": TINY})
    out = tmp_path / "out"
    words = "--members 2 --quick --shape tiny --context 16 --answer 1 --turns 1 --pause 0 --compare independent,sun"
    done = CliRunner().invoke(
        app, ["bench", "workflow", *words.split(), "--out", str(out), "--docs", str(tmp_path / "docs")]
    )
    assert done.exit_code == 0, done.stderr
    assert "points, about" in done.stderr and "2 members: peaks" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert results["comparisons"][0]["systems"] == ["independent", "sun"]
    assert (out / "report.html").exists() and (tmp_path / "docs" / "workflow-react.md").exists()
