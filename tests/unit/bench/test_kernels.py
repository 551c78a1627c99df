"""``heliostat bench kernels`` on tiny weights: everything is measured and told, and a peer that is not there is named."""

import json
from pathlib import Path

import pytest

from heliostat.bench import kernels_page
from heliostat.bench.kernels import PEERS, Plan, measure
from heliostat.ops.native import coded as kernel

pytestmark = pytest.mark.skipif(not kernel.built(), reason="the compiled kernel does not run here")


def test_a_page_of_tables_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in PEERS.values():
        monkeypatch.delenv(variable, raising=False)
    plan = Plan(
        shapes=((64, 128),), formats=("m1v4g128", "m2v8g128"), batches=(1, 2), bytes=1 << 16, repeats=1
    )
    found = measure(plan, tell=lambda _: None)
    found["peers"] = {"ggml": {"Q2_K 64x128 1": 1e-3}}
    birth = {"command": "c", "hardware": "h", "threads": 1, "commit": "x", "date": "d"}
    kernels_page.write(found, birth, tmp_path)
    text = (tmp_path / "codegemm.md").read_text()
    assert "m2v8g128, planes: 2" in text and "torch int8" in text and "| Q2_K | 64x128 | 1 | 1000 |" in text
    assert "m1v4g128, as it serves" in text
    assert "aqlm (HELIOSTAT_AQLM is not set)" in text and "ggml (" not in text
    assert json.loads((tmp_path / "codegemm.json").read_text())["found"]["plan"]["repeats"] == 1
    assert (tmp_path / "codegemm.svg").read_text().startswith("<svg")
