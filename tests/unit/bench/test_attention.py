"""The comparison of attention kinds: equal tries, an honest choice, and a page that says all there is, and what is not."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from heliostat.bench import attention, attention_page, attention_time
from heliostat.bench.attention import RATES, SEEDS, best, gradient, search, seeds_of, table, times
from heliostat.bench.trial_attention import KINDS, SIZES, AttentionTrial, kept_at, values_of
from heliostat.model.attention_kind import NAMES
from heliostat.train.pretrain_recipe import PretrainRecipe
from heliostat.train.spellings import make_recipe

STEPS = 40


def result(trial: AttentionTrial, choose: float, report: float) -> dict[str, Any]:
    """What a trial would keep."""
    numbers = [[0.1, 0.2], [0.3, 0.4]]
    return {
        "trial": {},
        "choose": choose,
        "report": report,
        "parameters": 1_000_000,
        "tokens": STEPS * 1024,
        "loss": [6.0 - 0.01 * step for step in range(STEPS)],
        "grad_norm": [1.0] * (STEPS - 1) + [9.0],
        "means": {"first": 0.2, "read": 0.1, "mass": 0.5, "entropy": 3.0},
        "heads": {"first": numbers, "read": numbers, "mass": numbers, "entropy": numbers},
        "pictures": [[[0.5, 0.0], [-0.5, 0.1]]] * 4,
        "seconds": 60.0,
    }


def keep(folder: Path, trial: AttentionTrial, choose: float, report: float) -> None:
    path = kept_at(folder, trial)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result(trial, choose, report)))


def keep_all(folder: Path, kinds: list[str]) -> None:
    """The middle rate is the best; every kind's report is a little better than the one before it."""
    for place, kind in enumerate(kinds):
        for trial, loss in zip(search(kind, steps=STEPS, size="1M"), (5.2, 5.0, 5.1), strict=True):
            keep(folder, trial, loss, 5.0 - 0.1 * place)
        for seed in seeds_of(search(kind, steps=STEPS, size="1M")[1])[1:]:
            keep(folder, seed, 5.0, 5.001 - 0.1 * place + 0.001 * seed.seed)


def times_of() -> dict[str, Any]:
    kinds = {k: {"seconds": 0.1, "ratio": 1.0 if k != "sink" else 1.08, "low": 1, "high": 1.1} for k in KINDS}
    steps = [
        {"batch": b, "kind": k, "seconds": 0.01, "ratio": 1.01} for b in (1, 8) for k in ("softmax", "affine")
    ]
    return {
        "training 1M": {"size": "1M", "repeats": 11, "threads": 1, "kinds": kinds},
        "decode 24M": {"shape": "24M", "rounds": 7, "steps": steps},
    }


def test_every_kind_is_tried_alike_and_is_all_there_is() -> None:
    assert {options["attention"] for options in KINDS.values()} == set(NAMES)
    assert {options.get("n") for options in KINDS.values()} >= {"visible", "fixed"}
    assert all([t.learning_rate for t in search(kind, steps=1, size="1M")] == list(RATES) for kind in KINDS)
    assert len({t.name for kind in KINDS for t in search(kind, steps=1, size="1M")}) == len(KINDS) * len(
        RATES
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_is_a_recipe_that_anybody_can_run(tmp_path: Path, kind: str, size: str) -> None:
    values = values_of(AttentionTrial(kind=kind, learning_rate=1e-3, seed=0, size=size), tmp_path)
    recipe = make_recipe(PretrainRecipe, values).resolve(bf16=True)
    assert recipe.attention_kind.name == KINDS[kind]["attention"]
    assert (recipe.attention_kind.length == recipe.max_length) is (KINDS[kind].get("n") == "fixed")


def test_the_rate_is_chosen_on_the_texts_for_it_alone(tmp_path: Path) -> None:
    trials = search("sink", steps=STEPS, size="1M")
    for trial, choose, report in zip(trials, (5.3, 5.1, 5.2), (4.0, 9.0, 3.0), strict=True):
        keep(tmp_path, trial, choose, report)
    assert best(tmp_path, trials) == trials[1]


def test_gradients_in_numbers() -> None:
    facts = gradient([1.0, 1.0, 1.5, 2.0, 2.0, 12.0])
    assert facts["mean"] == pytest.approx(19.5 / 6) and facts["steps"] == 6
    assert facts["variance"] == pytest.approx(facts["std"] ** 2)
    assert facts["spikes"] == 1  # median 1.75, median deviation 0.5: 12 is above 4.75
    assert gradient([3.0] * 5)["spikes"] == 0


def test_a_page_of_all_trials_says_everything(tmp_path: Path) -> None:
    keep_all(tmp_path, list(KINDS))
    rows = table(tmp_path, steps=STEPS, size="1M")
    assert set(rows) == set(KINDS) and all(row["learning_rate"] == RATES[1] for row in rows.values())
    page = attention_page.write(tmp_path / "docs", rows, times_of(), birth()).read_text()
    assert "Not complete" not in page and "nan" not in page
    for kind in KINDS:
        assert page.count(f"| {attention_page.shown(kind)} |") >= 4
    assert f"{math.exp(5.0):.2f}" in page and "9.000" not in page
    assert "lower with every seed" in page and "**missed** by sink +8.0%" in page
    assert "decode 24M: at most 5% more than softmax is met by all" in page
    for name in ("loss", "gradient", "first", "heads"):
        assert f"attention-{name}.svg" in page
        assert (tmp_path / "docs" / f"attention-{name}.svg").read_text().startswith("<svg")
    kept = json.loads((tmp_path / "docs" / "attention.json").read_text())
    assert set(kept["kinds"]) == set(KINDS) and kept["birth"]["wanted"] == 35


def test_a_page_of_some_trials_says_what_is_missing(tmp_path: Path) -> None:
    keep_all(tmp_path, ["softmax"])
    for trial in search("affine", steps=STEPS, size="1M"):
        keep(tmp_path, trial, 5.0, 5.0)
    keep(tmp_path, search("sink", steps=STEPS, size="1M")[1], 5.0, 5.0)
    rows = table(tmp_path, steps=STEPS, size="1M")
    page = attention_page.write(tmp_path / "docs", rows, {}, birth()).read_text()
    assert set(rows) == {"softmax", "affine", "sink"}
    assert "Not complete: 9 of 35 trials" in page and "Not measured yet" in page
    assert "| sink | not yet | 5.0000 | not yet |" in page
    assert "one seed, so it may be chance" in page
    assert "best rate tried is the highest or lowest for affine, n visible:" in page
    assert "no trial is done" in attention_page.page({}, {}, birth())


def birth() -> dict[str, Any]:
    return {
        "command": "python -m heliostat.bench.attention",
        "hardware": "a machine",
        "commit": "abc",
        "date": "2026-01-01",
        "python": "3.12",
        "versions": {"torch": "2"},
        "seeds": list(SEEDS),
        "steps": STEPS,
        "texts": ["a", "b"],
        "wanted": len(KINDS) * (len(RATES) + len(SEEDS) - 1),
    }


def test_times_are_read_behind_a_warning_and_only_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "time-training-1M.log").write_text('careful!\n{"kinds": {}}')
    (tmp_path / "logs" / "time-decode-24M.log").write_text("it failed")
    assert times(tmp_path) == {"training 1M": {"kinds": {}}}


def test_who_begins_a_turn_changes_and_ratios_are_of_one_turn() -> None:
    order: list[tuple[str, int]] = []

    def run(name: str, seconds: float) -> Any:
        def once(turn: int) -> float:
            order.append((name, turn))
            return seconds * (1 + turn)

        return once

    found = attention_time.in_turn({"softmax": run("softmax", 1.0), "sink": run("sink", 1.5)}, 5)
    assert [name for name, _ in order[:4]] == ["softmax", "sink", "sink", "softmax"]
    assert len(found["sink"]) == 5
    assert attention_time.beside(found)["sink"]["ratio"] == pytest.approx(1.5)


def test_a_training_step_of_every_kind_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_time, "LENGTH", 32)
    tiny = attention_time.Shape(16, 1, 2, 270, rows=1, length=16)
    found = attention_time.training(tiny, repeats=5, device="cpu")
    assert set(found) == set(KINDS) and all(len(s) == 5 and min(s) > 0 for s in found.values())


def test_what_is_there_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(attention, "run_modules", lambda waiting, **how: asked.extend(waiting))
    keep_all(tmp_path, list(KINDS)[:-1])
    from rich.console import Console

    for kind in KINDS:
        attention.run_all(
            tmp_path,
            search(kind, steps=STEPS, size="1M"),
            workers=1,
            device="cpu",
            console=Console(quiet=True),
        )
    assert asked == [t.name for t in search(list(KINDS)[-1], steps=STEPS, size="1M")]
