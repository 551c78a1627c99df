"""`bench workers` from the command line: a table, files that say what they are, and what is refused."""

import json
from pathlib import Path

from tests.unit.bench.test_sizing import COSTS
from tests.unit.bench.test_workers import ABOUT
from tests.unit.cli.conftest import Heliostat


def test_workers_and_what_cannot_be_compared(heliostat: Heliostat, tmp_path: Path) -> None:
    table, out = tmp_path / "costs.json", tmp_path / "out"
    table.write_text(json.dumps({**COSTS.to_json(), "about": ABOUT}), encoding="utf-8")
    said = heliostat(
        *(
            "bench",
            "workers",
            "--costs",
            table,
            "--members",
            2,
            "--sessions",
            24,
            "--turns",
            1,
            "--answer",
            20,
        ),
        *("--tpot", 0.0125, "--loads", "0.5", "--out", out, "--docs", tmp_path / "docs"),
    )
    assert "kind (B)" in said.stdout and "decode workers saved" in said.stdout.replace("\n", " ")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["kind"].startswith("B:") and results["birth"]["commit"]
    assert {row["sharing"] for row in results["rows"]} >= {"independent", "sun"}
    assert "<svg" in (out / "report.html").read_text(encoding="utf-8")
    assert "Workers saved at equal service" in (tmp_path / "docs" / "workers.md").read_text(encoding="utf-8")
    strange = heliostat("bench", "workers", "--costs", table, "--compare", "moon", "--loads", "1", status=2)
    assert "no sharing 'moon'" in strange.stderr
    assert "--loads x" in heliostat("bench", "workers", "--costs", table, "--loads", "x", status=2).stderr
    assert "cannot be read" in heliostat("bench", "workers", "--costs", tmp_path / "no", status=2).stderr
