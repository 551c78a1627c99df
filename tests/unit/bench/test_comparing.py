"""A comparison goes through all its points, keeps each, goes on where it was, and asks every system the same."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heliostat.bench import comparing, decode
from heliostat.bench.compared_page import (
    cap_cells,
    load_cells,
    markdown,
    peak_cells,
    warnings,
    write_docs,
    write_report,
)
from heliostat.bench.comparing import Kept, Silent, run_all
from heliostat.bench.comparison import LOAD, ONE_MEMBER, Comparison
from heliostat.bench.records import Run
from heliostat.bench.seated import Seated, Timesheet
from heliostat.bench.systems import SYSTEMS
from heliostat.bench.workloads import Lengths, Session
from heliostat.errors import Refused

TINY = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
SMALL = Lengths(context=32, role=2, answer=2, observation=4)


@pytest.fixture
def it(monkeypatch: pytest.MonkeyPatch) -> Comparison:
    monkeypatch.setattr(decode, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr("heliostat.bench.stand.SHAPES", {"tiny": TINY})
    load = replace(LOAD, members=("m1", "m2", "m3"), lengths=SMALL, turns=1, sessions=3, pause=0.0)
    return Comparison(
        systems=(SYSTEMS["independent"], SYSTEMS["icarus"]),
        load=load,
        shape="tiny",
        loads=(0.5, 1.0),
        rounds=2,
        caps=(1, 2),
        saturated=3,
        varied=2,
        pilot=1,
        variants=(ONE_MEMBER,),
    )


class Count(Silent):
    """Remembers which points were measured."""

    def __init__(self, *, stop_at: int = -1) -> None:
        self.names: list[str] = []
        self.expected = 0
        self.stop_at = stop_at

    def begin(self, points: int, seconds: float) -> None:
        assert seconds > 0
        self.expected = points

    def point(self, name: str) -> None:
        if len(self.names) == self.stop_at:
            raise KeyboardInterrupt
        self.names.append(name)


def test_all_points_are_made_once_and_said(it: Comparison, tmp_path: Path) -> None:
    tell = Count()
    results = run_all([it], tmp_path, command="heliostat bench workflow", tell=tell)
    assert len(tell.names) == len(set(tell.names)) == it.points == tell.expected
    assert not results["stopped"]
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert results["birth"]["seed"] == 0 and results["birth"]["repeats"] == 2
    (found,) = results["comparisons"]
    assert [part["variant"] for part in found["peaks"]] == ["", "one member a session"]
    assert [part["load"] for part in found["loads"]] == [0.5, 1.0]
    shared = found["peaks"][0]["systems"]["icarus"]
    assert (
        shared["prefill_rows_a_session"]
        < found["peaks"][0]["systems"]["independent"]["prefill_rows_a_session"]
    )
    assert shared["prefill_rows_a_session"] == pytest.approx(shared["least_prefill_rows_a_session"])
    again = Count()
    assert run_all([it], tmp_path, command="heliostat bench workflow", tell=again)["comparisons"] == [found]
    assert not again.names, "what is there is not run again"
    _said(results, tmp_path)


def _said(results: dict[str, Any], folder: Path) -> None:
    """Pages hold every system, variant and load, and why a number is missing."""
    (found,) = results["comparisons"]
    assert [row[:2] for row in peak_cells(found)[1]] == [
        [variant, system]
        for variant in ("as fixed", "one member a session")
        for system in ("independent", "icarus")
    ]
    assert "too few: 2 pairs of 5" in peak_cells(found)[1][1]
    heads, rows = cap_cells(found)
    assert heads == ["in flight", "1", "2"] and all(float(x) > 0 for row in rows for x in row[1:])
    assert all("too few: 3 sessions of 200" in row for row in load_cells(found)[1])
    page = write_report(folder / "report.html", results).read_text()
    assert page.count("<svg") >= 8 and "where the machine" in page and "one member a session" in page
    files = write_docs(folder / "docs", "workflow-react", results)
    text = files[0].read_text()
    assert "| icarus |" in text and "heliostat bench workflow" in text and "seed 0, 2 rounds" in text
    assert all((folder / "docs" / name.name).exists() for name in files)
    assert "workflow-react-goodput.svg" in text
    assert not any("stopped" in line for line in warnings(results))
    assert "Note: stopped early" in markdown({**results, "stopped": True}, [])


def test_several_numbers_of_members_are_one_picture(it: Comparison, tmp_path: Path) -> None:
    small = replace(it, variants=(), loads=(1.0,), rounds=1, caps=(1,), pilot=0)
    two = replace(small, load=replace(small.load, members=("m1", "m2")))
    results = run_all([two, small], tmp_path, command="", tell=Silent())
    assert [found["members"] for found in results["comparisons"]] == [2, 3]
    for found in results["comparisons"]:
        found["peaks"][0]["systems"]["icarus"]["ratio"] = {"value": 2.0, "low": 1.0, "high": 3.0}
    files = write_docs(tmp_path / "docs", "workflow-members", results)
    assert "workflow-members-members.svg" in {file.name for file in files}
    assert "icarus" in (tmp_path / "docs" / "workflow-members-members.svg").read_text()


def test_every_system_is_asked_the_same_sessions(
    it: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Sequence[Session], set[str]]] = []
    driven = comparing.driven

    async def noted(seated: Seated, made: Sequence[Session], run: Run) -> Timesheet:
        asked.append((made, {row.speaker for row in seated.rows.values()}))
        return await driven(seated, made, run)

    monkeypatch.setattr(comparing, "driven", noted)
    it = replace(it, pilot=0, variants=(), loads=(1.0,))
    run_all([it], tmp_path, command="", tell=Silent())
    (one, mine), (other, theirs) = asked[-2:]
    assert one == other and mine != theirs


def test_ctrl_c_keeps_whole_points_and_the_next_run_goes_on(it: Comparison, tmp_path: Path) -> None:
    results = run_all([it], tmp_path, command="", tell=Count(stop_at=7))
    assert results["stopped"] and len(list((tmp_path / "points").iterdir())) == 7
    assert results["comparisons"][0]["peaks"], "rounds of both systems are there"
    assert write_report(tmp_path / "report.html", results).exists()
    rest = Count()
    assert not run_all([it], tmp_path, command="", tell=rest)["stopped"]
    assert len(rest.names) == it.points - 7 == rest.expected


def test_a_run_that_is_broken_off_is_no_point(
    it: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(seated: Seated, made: Sequence[Session], run: Run) -> Timesheet:
        run.stopped = True
        return seated.sheet

    monkeypatch.setattr(comparing, "driven", interrupted)
    results = run_all([it], tmp_path, command="", tell=Silent())
    assert results["stopped"] and not list((tmp_path / "points").iterdir())
    assert write_report(tmp_path / "report.html", results).exists()


def test_a_run_in_which_a_request_failed_is_no_point(
    it: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Comparison, "pages", lambda it: 1)
    with pytest.raises(Refused, match=r"independent: \d+ requests failed, the first with: .* pages"):
        run_all([it], tmp_path, command="", tell=Silent())
    assert not list((tmp_path / "points").iterdir())


def test_a_folder_of_another_comparison_is_refused(tmp_path: Path) -> None:
    Kept(tmp_path, {"members": 2})
    assert Kept(tmp_path, {"members": 2}).found == {}
    with pytest.raises(Refused, match="holds another comparison"):
        Kept(tmp_path, {"members": 4})
