"""The demo: every line, resumed where it was, a report that opens alone."""

import json
from pathlib import Path

import pytest

from heliostat.bench import demo
from heliostat.errors import Refused


@pytest.fixture(scope="module")
def done(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    out = tmp_path_factory.mktemp("demo")
    return out, demo.main(out=out, task="tools", steps=2, as_json=True, items=3, base=tiny_base)


def test_there_is_a_line_for_the_base_every_method_and_both_controls(
    done: tuple[Path, dict[str, object]],
) -> None:
    names = [line["name"] for line in done[1]["lines"]]  # type: ignore[attr-defined]
    assert names[0] == "base, untuned" and [m.label for m in demo.METHODS] == names[1:6]
    assert sum(name.startswith("control") for name in names) == 2


def test_the_report_needs_no_network(done: tuple[Path, dict[str, object]]) -> None:
    html = (done[0] / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") >= 3 and "src=" not in html and "<script" not in html and "href=" not in html


def test_results_carry_their_birth_certificate(done: tuple[Path, dict[str, object]]) -> None:
    birth = json.loads((done[0] / "results.json").read_text())["birth"]
    assert birth["command"].startswith("heliostat demo") and birth["hardware"] and birth["versions"]["torch"]


def test_a_second_run_trains_nothing_again(
    done: tuple[Path, dict[str, object]], tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*args: object, **kwargs: object) -> None:
        raise AssertionError("a finished member was trained again")

    monkeypatch.setattr("heliostat.train.tune.tune", trained)
    again = demo.main(out=done[0], task="tools", steps=2, as_json=True, items=3, base=tiny_base)
    assert again["lines"] == done[1]["lines"]


def test_another_demo_does_not_mix_with_it(done: tuple[Path, dict[str, object]], tiny_base: Path) -> None:
    with pytest.raises(Refused, match="another --out"):
        demo.main(out=done[0], task="math", steps=2, items=3, base=tiny_base)


def test_shared_weights_are_counted_once(done: tuple[Path, dict[str, object]]) -> None:
    memory: dict[str, dict[str, float]] = done[1]["memory"]  # type: ignore[assignment]
    separate, sun = memory["4 x full fine-tune"]["weights"], memory["4 x SUN"]["weights"]
    assert sun == separate * 5 / 4  # four writers and the base
    assert memory["4 x PrefillShare"]["kv"] * 4 == memory["4 x full fine-tune"]["kv"]
    assert memory["4 x ICaRus, r 16"]["weights"] < separate
