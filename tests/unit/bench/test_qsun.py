"""The comparison of frozen halves in codebooks: which trials it asks for, what they are called, and its page."""

import json
from pathlib import Path

import pytest

from heliostat.bench import qsun
from heliostat.bench.methods import FORMATS, LOW_BIT
from heliostat.bench.qsun import page, swapped, write
from heliostat.bench.qsun_decode import coded, measure, weight
from heliostat.bench.results import search
from heliostat.bench.trial import recipe_of
from heliostat.linear.codebook import coded_linears
from heliostat.ops.codebook_format import Format

BIRTH = {
    "command": "python -m heliostat.bench.qsun",
    "hardware": "a desk",
    "commit": "0123",
    "date": "2026-01-01",
    "versions": {"torch": "2"},
    "seeds": [0, 1, 2],
    "steps": 400,
}
SPEED = {
    "shape": "100M",
    "format": "m1v4g128",
    "repeats": 5,
    "megabytes": [136.0, 18.0],
    "birth": BIRTH,
    "batches": {"1": {"plain": 100.0, "coded": 150.0, "ratio": 1.5}},
}


@pytest.mark.parametrize(("group", "option"), [("sun", "speaker"), ("prefillshare", "writer")])
def test_each_low_method_tries_as_many_rates_with_its_module_in_the_right_part(
    group: str, option: str
) -> None:
    plain, *low = LOW_BIT[group]
    assert [method.frozen for method in low] == list(FORMATS) and plain.frozen == ""
    for method in low:
        trials = search("tools", method, 400)
        assert [t.learning_rate for t in trials] == list(plain.rates) and method.against == plain.name
        assert all(trial.name.endswith(f"-on-{method.frozen}") for trial in trials)
        recipe = recipe_of(trials[0], Path("out"), Path("data.jsonl"))
        assert getattr(recipe, option) == method.frozen
    recipe = recipe_of(search("tools", plain, 400)[0], Path("out"), Path("data.jsonl"))
    assert recipe.speaker is None and recipe.writer is None


def test_what_is_swapped_in_untrained() -> None:
    assert list(swapped("sun").values()) == ["sun@base-4bit", "sun@base-2bit"]
    assert list(swapped("independent").values()) == ["quantized@m2v4g128", "quantized@m1v4g128"]


def test_a_page_keeps_the_speed_that_was_measured(tmp_path: Path) -> None:
    tables = {"tools": {"SUN": {"seeds": [0.8, 0.9, 0.85], "learning_rate": 0.005}}}
    made = {"base-2bit": {"format": "m1v4g128", "bits": 2.7, "perplexity": [2.5, 2.7]}}
    (tmp_path / "qsun.json").write_text(json.dumps({"speed": SPEED}), encoding="utf-8")
    text = write(tmp_path, tables, made, BIRTH).read_text(encoding="utf-8")
    for part in (
        "| SUN | 85.0% |",
        "| base-2bit | m1v4g128 | 2.70 | 2.500 | 2.700 |",
        "| 1 | 100 | 150 | 1.50 |",
    ):
        assert part in text
    assert (tmp_path / "qsun-tools.svg").exists()
    assert "Decoding" not in page(tables, made, None, BIRTH) and "right greedy" not in page(
        {}, {}, SPEED, None
    )


def test_speed_is_measured_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from heliostat.bench import decode, qsun_decode

    tiny = {
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "intermediate_size": 64,
        "head_dim": 32,
    }
    monkeypatch.setattr(decode, "SHAPES", {"tiny": tiny})
    monkeypatch.setattr(qsun_decode, "REPEATS", 1)
    monkeypatch.setattr(decode, "PROMPT", 4)
    monkeypatch.setattr(decode, "STEPS", 3)
    model = coded("tiny", Format.parse("m1v4g32"))
    assert len(coded_linears(model)) == 7 and 0 < weight(model) < weight(qsun_decode.plain("tiny"))
    found = measure("tiny", Format.parse("m1v4g32"), [1, 2])
    assert set(found["batches"]) == {"1", "2"}
    assert found["batches"]["2"]["ratio"] == pytest.approx(
        found["batches"]["2"]["coded"] / found["batches"]["2"]["plain"]
    )


def test_only_known_groups() -> None:
    with pytest.raises(KeyError):
        qsun.measure(Path("nowhere"), ["tools"], ["none"], steps=1, workers=1, console=None)  # type: ignore[arg-type]
