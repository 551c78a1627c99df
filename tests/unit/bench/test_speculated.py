"""Ratios are of pairs of one turn, verdicts say what was met, the page holds every rule."""

from pathlib import Path
from typing import Any

import pytest

from heliostat.bench.speculate_page import write_page
from heliostat.bench.speculated import ALWAYS, Speeds, judge_share, ruled, verdicts

RULES = ("off", "ngram", "lossless", "judged:recall", "judged:f1", "judged:0.5", "topk:2")
PACE = {
    "off": 100,
    "ngram": 90,
    "lossless": 120,
    "judged:recall": 156,
    "judged:f1": 180,
    "judged:0.5": 170,
    "topk:2": 150,
}
RIGHT = {"judged:recall": 0.795, "judged:f1": 0.7, "judged:0.5": 0.75, "topk:2": 0.6}


def found(**changed: float) -> dict[str, Any]:
    """Points as a measurement leaves them; every second turn is half as fast for all."""
    pace, right = PACE | {k.replace("_", ":"): v for k, v in changed.items()}, RIGHT
    answers = {
        f"answers/{seed}/{rule}/{name}": {
            "accuracy": right.get(rule, 0.8) + 0.01 * seed,
            "items": 200,
            "tokens": 1000,
            "accepted_length": 2.0,
            "accepted": 0.5,
            "judged": 0.1,
        }
        for seed in (0, 1)
        for rule in RULES
        for name in ("told", "held out")
        if seed == 0 or rule.startswith(("judged:r", "judged:f"))
    }
    pace[ALWAYS] = 60
    turns = {
        f"speed/{batch}/{again}": {
            rule: {"tokens": pace[rule] * batch, "seconds": 1.0 + again % 2, "drafted": 50.0}
            for rule in (*RULES, ALWAYS)
        }
        for batch in (1, 2)
        for again in range(5)
    }
    point = {"theta": 0.5, "accepted": 0.4, "recall": 0.9, "precision": 0.7, "f1": 0.6}
    judge = {"tokens": [80, 20], "tau": -3.0, "known": 30, "acceptable": 0.5, "auc": 0.8}
    judge |= {"points": {"recall": point, "f1": point}}
    by_rule = {rule: {"accuracy": 0.7, "accepted_length": 3.0} for rule in ("judged:recall", "judged:f1")}
    points: dict[str, Any] = {
        **answers,
        **turns,
        "judge/0": judge,
        "judge/1": judge,
        "suffix/20": judge | {"answers": by_rule},
        "judge_seconds": {"8": 1e-5, "64": 2e-5},
        "transfer": {
            "base -> m": {"auc": None, "accepted": 0.1, "recall": 1.0, "precision": 0.5, "tokens": 9}
        },
        "birth": {"command": "c", "hardware": "h", "threads": 1, "commit": "x", "date": "d"},
    }
    facts = {"rules": RULES, "seeds": 2, "batches": [1, 2], "repeats": 5, "calls": 8, "suffixes": [20]}
    return {"facts": facts | {"parameters": {"base": 10, "small": 1}}, "points": points}


def test_ratios_are_of_pairs() -> None:
    speeds = Speeds(
        [{"a": {"tokens": 10, "seconds": s}, "b": {"tokens": 10, "seconds": 2 * s}} for s in (1, 5, 9)]
    )
    assert speeds.ratio("a", "b") == 2 and speeds.median("b") == 1


def test_every_rule_is_summed_up() -> None:
    by_name = {one.rule: one for one in ruled(found())}
    assert list(by_name) == list(RULES)
    assert by_name["judged:recall"].over_lossless == {1: pytest.approx(1.3), 2: pytest.approx(1.3)}
    assert by_name["lossless"].over_off[1] == pytest.approx(1.2)
    assert by_name["judged:recall"].accuracy["told"] == pytest.approx(0.8)
    assert by_name["judged:recall"].spread == pytest.approx(0.01) and by_name["off"].spread == 0
    assert 0 < judge_share(found()) < 0.01


def test_verdicts_follow_the_numbers() -> None:
    lossless, judged, others = verdicts(ruled(found()))
    assert "**met**" in lossless and "1.20 at batch 1" in lossless
    assert "**met**" in judged and "`judged:recall`, 1.30 times" in judged
    assert others == "No rule without training stays within a point."
    slow = verdicts(ruled(found(lossless=95)))
    assert "**missed**" in slow[0] and "0.95" in slow[0]
    near = verdicts(ruled(found(judged_recall=130)))
    assert "**missed**" in near[1] and "1.08 times" in near[1]


def test_the_page_has_all_of_it(tmp_path: Path) -> None:
    page = write_page(found(), tmp_path).read_text(encoding="utf-8")
    for part in (
        *(f"`{rule}`" for rule in RULES),
        "base -> m",
        "–",
        "80.0 % (1.0 % apart)",
        "| N 20 | -3.00",
        "times the speed: 2.00 at batch 1, 2.00 at batch 2.",
    ):
        assert part in page, part
    assert {p.name for p in tmp_path.iterdir()} == {
        "selfjudge.md",
        "selfjudge.json",
        "selfjudge-speed.svg",
        "selfjudge-theta.svg",
    }
