"""``bench speculate`` on a toy: every point is measured once, a stopped run goes on, other data is another folder."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heliostat.bench import speculate
from heliostat.bench.speculate import CHOSEN, LOSSLESS, NGRAM, OFF, Measured, measure
from heliostat.bench.speculate_page import write_page
from heliostat.errors import Refused
from heliostat.export import import_draft


@pytest.fixture(scope="module")
def wish(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_family_made: Path,
    tiny_data: Path,
    make_checkpoint: Callable[..., Path],
) -> Measured:
    folder = tmp_path_factory.mktemp("bench")
    family = Path(shutil.copytree(tiny_family_made, folder / "fam"))
    import_draft(family, "small", make_checkpoint(seed=5, num_hidden_layers=1))
    data: dict[str, Any] = {"prompts": str(tiny_data), "test": str(tiny_data), "held_out": str(tiny_data)}
    return Measured(
        family=str(family),
        draft="small",
        **data,
        members={"math": str(tiny_data)},
        metric="exact",
        tau=-4.0,
        items=20,
        batches=(1, 2),
        calls=2,
        seeds=1,
        suffixes=(3,),
        fewer=12,
        longest=6,
        rules=(OFF, NGRAM, LOSSLESS, *CHOSEN, "topk:2"),
        out=str(folder / "out"),
    )


def test_a_stopped_measurement_goes_on(
    wish: Measured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain, turns = speculate._turn, [0]

    def stopping(*given: Any) -> dict[str, Any]:
        turns[0] += 1
        if turns[0] == 4:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(speculate, "_turn", stopping)
    with pytest.raises(KeyboardInterrupt):
        measure(wish)

    def noting(*given: Any) -> dict[str, Any]:
        turns.append(1)
        return plain(*given)

    monkeypatch.setattr(speculate, "_turn", noting)
    monkeypatch.setattr(speculate, "_judge", lambda *given: pytest.fail("it is measured already"))
    found = measure(wish)
    assert sum(turns[1:]) == 10 - 3
    points = found["points"]
    assert points[f"answers/0/{OFF}/told"]["accepted_length"] == 1
    for name in ("told", "held out"):
        assert (
            points[f"answers/0/{LOSSLESS}/{name}"]["accuracy"]
            == points[f"answers/0/{OFF}/{name}"]["accuracy"]
        )
        assert points[f"answers/0/{NGRAM}/{name}"]["tokens"] == points[f"answers/0/{OFF}/{name}"]["tokens"]
        assert points[f"answers/0/{LOSSLESS}/{name}"]["judged"] == 0
    assert set(points["transfer"]) == {f"{a} -> {b}" for a in ("base", "math") for b in ("base", "math")}
    assert "`topk:2`" in write_page(found, tmp_path).read_text(encoding="utf-8")
    with pytest.raises(Refused, match="another family, other data or other options"):
        measure(replace(wish, items=19))


def test_too_few_turns_are_refused(wish: Measured) -> None:
    with pytest.raises(Refused, match="repeats is 4"):
        replace(wish, repeats=4)
