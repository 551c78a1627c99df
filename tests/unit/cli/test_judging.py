"""``heliostat module add`` takes a draft, ``heliostat judge`` says what its judge is worth and where everything lies."""

import json
from collections.abc import Callable
from pathlib import Path

from heliostat.build import read_family
from heliostat.model.judge import read_judge
from tests.unit.cli.conftest import Heliostat


def test_from_a_draft_to_a_judge_in_use(
    heliostat: Heliostat, bare_family: Path, tiny_data: Path, make_checkpoint: Callable[..., Path]
) -> None:
    small = make_checkpoint(seed=5, num_hidden_layers=1)
    said = heliostat("module", "add", bare_family, "small", "--from", small).stdout
    assert "small is a module of" in said and "heliostat judge" in said
    asked = ("judge", bare_family, "--draft", "small", "--data", tiny_data, "--metric", "exact", "--tau", -4)
    shown = heliostat(*asked, "--max-tokens", 8, "--theta", "f1").stdout
    for part in ("area under the curve", "theta by f1", "<- used", "exact", "tokens a pass", "labels:"):
        assert part in shown, part
    judge = read_judge(bare_family, "base-small")
    assert judge.theta == judge.thetas["f1"] and (bare_family / "judges" / "base-small.svg").is_file()
    done = heliostat(*asked, "--max-tokens", 8, "--json", "--no-picture", "--name", "other")
    facts = json.loads(done.stdout)
    assert facts["theta"] == facts["thetas"]["recall"] and facts["answers"] == []
    answered = heliostat(*("generate", bare_family, "--prompt", "add 1 and 2", "--max-tokens", 4)).stdout
    assert answered
    assert "no module any more" in heliostat("module", "rm", bare_family, "small").stdout
    assert set(read_family(bare_family).modules) == {"base"}
    refused = heliostat(*asked, status=2).stderr
    assert "no module 'small'" in refused


def test_a_draft_that_does_not_belong_is_refused(
    heliostat: Heliostat, bare_family: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    small = make_checkpoint(seed=5, num_hidden_layers=1)
    add = ("module", "add", bare_family)
    assert "already a module 'base'" in heliostat(*add, "base", "--from", small, status=2).stderr
    assert "is no folder" in heliostat(*add, "small", "--from", tmp_path / "gone", status=2).stderr
    few = make_checkpoint(seed=6, vocab_size=40)
    assert "knows 40 tokens" in heliostat(*add, "small", "--from", few, status=2).stderr
    tokenizer = small / "tokenizer.json"
    changed = json.loads(tokenizer.read_text(encoding="utf-8")) | {"pre_tokenizer": None}
    tokenizer.write_text(json.dumps(changed), encoding="utf-8")
    assert "another tokenizer" in heliostat(*add, "small", "--from", small, status=2).stderr
    assert set(read_family(bare_family).modules) == {"base"}
