"""``heliostat quantize`` and ``module rm`` say what they did, and nothing is made by a refused wish."""

import json
from pathlib import Path

from heliostat.build import read_family
from tests.unit.cli.conftest import Heliostat

QUICK = ("--tokens", 400, "--tuning-steps", 1, "--format", "m1v4g32")


def texts(folder: Path) -> Path:
    path = folder / "calib.txt"
    path.write_text(
        "\n\n".join(f"add {a} and {b}: {a + b}" for a in range(8) for b in range(8)), encoding="utf-8"
    )
    return path


def test_a_module_is_made_shown_and_removed(heliostat: Heliostat, bare_family: Path, tmp_path: Path) -> None:
    data = texts(tmp_path)
    said = heliostat("quantize", bare_family, "--name", "base-2bit", "--data", data, *QUICK).stdout
    for part in ("down_proj", "perplexity", "bits a weight", "--speaker base-2bit", "embedding, head, norms"):
        assert part in said
    found = heliostat("quantize", bare_family, "--name", "b", "--data", data, *QUICK, "--json")
    facts = json.loads(found.stdout)
    assert facts["module"]["quantization"] == "m1v4g32" and len(facts["errors"]) == 2
    assert json.loads(found.stderr.splitlines()[-1])["done"] == 2
    shown = json.loads(heliostat("inspect", bare_family, "--json").stdout)
    assert [m["quantization"] for m in shown["modules"]] == [None, "m1v4g32", "m1v4g32"]
    assert "m1v4g32, " in heliostat("inspect", bare_family).stdout
    assert "no module any more" in heliostat("module", "rm", bare_family, "b").stdout
    assert set(read_family(bare_family).modules) == {"base", "base-2bit"}


def test_refusals_name_what_is_wrong(heliostat: Heliostat, bare_family: Path, tmp_path: Path) -> None:
    data = texts(tmp_path)
    asked = ("quantize", bare_family, "--data", data)
    assert "is no format" in heliostat(*asked, "--name", "low", "--format", "int4", status=2).stderr
    assert "already a module" in heliostat(*asked, "--name", "base", "--format", "m1v4g32", status=2).stderr
    sharing = ("train", bare_family, "--member", "m", "--data", data)
    wrong = heliostat(*sharing, "--sharing", "prefillshare", "--speaker", "base", status=2).stderr
    assert "no frozen speaker" in wrong and "--writer" in wrong
    none = heliostat(*sharing, "--sharing", "independent", "--writer", "base", status=2).stderr
    assert "neither --speaker nor --writer" in none
    assert not (bare_family / "quantizing").exists()
