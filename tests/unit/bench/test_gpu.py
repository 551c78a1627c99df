"""The GPU benchmark's dry run: every line of it but the device's own, on the CPU, into a folder of its own."""

import json
from pathlib import Path

import pytest
import torch

from heliostat.bench.gpu import main
from heliostat.errors import Refused


def test_the_dry_run_writes_its_page(tmp_path: Path) -> None:
    main(["--dry-run", "--docs", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["birth"]["command"].endswith("--dry-run")
    rows = found["rows"]
    assert [row["batch"] for row in rows["decode"]] == [row["batch"] for row in rows["prefill"]] == [1, 3]
    assert all(row["on"] > 0 and row["off"] > 0 for row in rows["decode"])
    assert len(rows["attention"]) == 4 and all(row["torch_error"] < 0.05 for row in rows["attention"])
    families = {row["system"]: row for row in rows["families"]}
    assert list(families) == ["independent", "multilora", "sun", "prefillshare", "icarus"]
    assert (
        families["sun"]["bytes"] == 1.5 * families["independent"]["bytes"] == 3 * families["icarus"]["bytes"]
    )
    assert (families["sun"]["members"], families["multilora"]["members"]) == (2, 3)
    assert all(row["1"] > 0 and row["2"] > 0 and row["context"] > 0 for row in families.values())
    page = (tmp_path / "gpu.md").read_text()
    assert "consolidation" in page and "| icarus | 3 |" in page
    assert page.count("\n| 1 |") == 3 and "--dry-run" in page


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(Refused):
        main(["--device", "cpu", "--docs", str(tmp_path)])
    assert not list(tmp_path.iterdir())
