"""`heliostat train` and `pretrain`: what is said before, shown after, left on disk, and printed as JSON."""

import json
from pathlib import Path

from heliostat.build import read_family
from tests.unit.cli.conftest import Heliostat

QUICK = ["--max-steps", 2, "--max-length", 128, "--learning-rate", 0.01]


def test_train_shows_what_it_came_to(heliostat: Heliostat, bare_family: Path, tiny_data: Path) -> None:
    words = ["--member", "m", "--sharing", "sun", "--data", tiny_data, "--eval-data", tiny_data]
    result = heliostat("train", bare_family, *words, *QUICK)
    assert "trainable 28,192 of 56,384 parameters (50.0 %)" in " ".join(result.stderr.split())
    for said in ("before", "after", "reference", "loss", "eval loss", "accuracy", "seconds", "tokens/s"):
        assert said in result.stdout
    assert f"heliostat chat {bare_family} --member m" in result.stdout
    run = bare_family / "runs" / "m"
    assert {"recipe.yaml", "log.jsonl", "loss.svg"} <= {p.name for p in run.iterdir()}
    assert "accuracy" in read_family(bare_family).member("m").evaluation


def test_train_prints_one_json_object(heliostat: Heliostat, bare_family: Path, tiny_data: Path) -> None:
    words = ["--member", "m", "--sharing", "icarus", "--tuner", "lora", "--data", tiny_data, "--json"]
    facts = json.loads(heliostat("train", bare_family, *words, *QUICK).stdout)
    assert (facts["member"], facts["sharing"], facts["tuner"], facts["steps"]) == ("m", "icarus", "lora", 2)
    assert len(facts["samples"]) == 3
    assert set(facts["samples"][0]) == {"prompt", "before", "after", "reference"}
    assert "accuracy" not in facts  # nothing was held out


def test_the_recipe_that_a_run_leaves_makes_the_same_member_again(
    heliostat: Heliostat, bare_family: Path, tiny_data: Path
) -> None:
    heliostat("train", bare_family, "--member", "m", "--sharing", "sun", "--data", tiny_data, *QUICK)
    recipe = bare_family / "runs" / "m" / "recipe.yaml"
    heliostat("train", recipe, "--member", "twin")
    again = heliostat("train", recipe, status=2).stderr
    assert "it is finished" in again and f"heliostat inspect {bare_family}" in again
    other = heliostat("train", recipe, "--max-steps", 3, status=2).stderr
    assert "finished" not in other and f"heliostat member rm {bare_family} m" in other
    family = read_family(bare_family)
    assert family.module("twin.own").digest == family.module("m.own").digest


def test_a_dry_run_says_what_it_takes_and_makes_nothing(
    heliostat: Heliostat, bare_family: Path, tiny_data: Path
) -> None:
    words = ["train", bare_family, "--member", "m", "--sharing", "sun", "--data", tiny_data, "--dry-run"]
    assert "trainable parameters" in heliostat(*words).stdout
    assert json.loads(heliostat(*words, "--json").stdout)["trainable"] == 28192
    assert not (bare_family / "runs").exists()


def test_other_spellings_are_hinted_at(heliostat: Heliostat, bare_family: Path, tiny_data: Path) -> None:
    words = ["--member", "m", "--sharing", "sun", "--dataset", tiny_data, "--cutoff_len", 128, "--lr", 0.01]
    stderr = heliostat("train", bare_family, *words, "--dry-run").stderr
    for hint in (
        "dataset is read as data",
        "cutoff_len is read as max_length",
        "lr is read as learning_rate",
    ):
        assert hint in stderr


def test_pretrain_makes_a_base_that_init_takes(heliostat: Heliostat, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{a} and {b} is {a + b}" for a in range(20) for b in range(10)))
    shape = ["--hidden-size", 16, "--num-hidden-layers", 1, "--num-attention-heads", 2]
    shape += ["--num-key-value-heads", 1, "--intermediate-size", 16, "--vocab-size", 270, "--max-length", 32]
    words = ["--output-dir", tmp_path / "base", "--data", text, *shape, "--max-steps", 2]
    facts = json.loads(heliostat("pretrain", *words, "--json").stdout)
    assert facts["steps"] == 2 and facts["loss"] > 0
    assert "a new family" in heliostat("init", tmp_path / "fam", "--base", tmp_path / "base").stdout
