"""An engine is asked in turns with whoever asks; sessions wait outside where only so many may be in."""

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from heliostat.bench import decode
from heliostat.bench.client import Asking
from heliostat.bench.comparing import driven
from heliostat.bench.records import PHASES, Record, Run
from heliostat.bench.seated import Gate, Seated, Timesheet
from heliostat.bench.stand import Stand
from heliostat.bench.systems import SYSTEMS
from heliostat.bench.workloads import Lengths, Load, Session, sessions
from heliostat.engine.step import Step

TINY = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
LOAD = Load(
    members=("m1", "m2", "m3"),
    lengths=Lengths(context=40, role=2, answer=3, observation=8),
    sessions=4,
    turns=1,
    role_place="kept",
    assignment="rotate",
    pause=0.2,
)
Virtually = Callable[[Coroutine[Any, Any, Any]], Any]


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    monkeypatch.setattr(decode, "SHAPES", {"tiny": TINY})
    monkeypatch.setattr("heliostat.bench.stand.SHAPES", {"tiny": TINY})
    return Stand("tiny", dtype=torch.float32)


def seated(stand: Stand, system: str, made: list[Session], *, cap: int | None = None) -> Seated:
    engine = stand.engine(SYSTEMS[system], LOAD.members, pages=60)
    return Seated(engine, SYSTEMS[system].rows(LOAD.members), Gate(cap, made))


@pytest.mark.parametrize("system", ["independent", "icarus", "prefillshare"])
def test_every_call_is_answered_with_as_many_ids_as_were_asked_for(
    stand: Stand, virtually: Virtually, system: str
) -> None:
    made, run = sessions(LOAD), Run(0, 1.0)
    sheet = virtually(driven(seated(stand, system, made), made, run))
    assert [r.outcome for r in run.records] == ["answered"] * sum(len(s.calls) for s in made)
    assert all(r.answer_tokens == r.asked_tokens == r.chunks for r in run.records)
    assert not any(r.stand_ins for r in run.records)
    for record in run.records:
        assert record.phases is not None and tuple(record.phases) == PHASES
        assert record.last is not None and record.sent is not None
        assert sum(record.phases.values()) == pytest.approx(record.last - record.sent)
    prompt = sum(r.prompt_tokens or 0 for r in run.records)
    cached = sum(r.cached_tokens or 0 for r in run.records)
    answers = sum(r.tokens for r in run.records)
    assert sheet.prefill_rows == prompt - cached
    assert sheet.decode_rows == answers - len(run.records), "the last token of an answer is never read"
    assert (cached > 0) == (system != "independent")


def test_only_so_many_sessions_are_in_at_a_time(stand: Stand, virtually: Virtually) -> None:
    made, run = [Session(s.number, 0.0, s.calls) for s in sessions(LOAD)], Run(0, None)
    virtually(driven(seated(stand, "independent", made, cap=1), made, run))
    sent = {n: min(r.sent or 0.0 for r in run.records if r.session == n) for n in run.spans}
    assert all(first == 0.0 for first in sent.values()), "outside they wait on their own time"
    order = sorted(run.spans.values(), key=lambda span: span[1])
    pauses = [sum(c.pause for c in session.calls) for session in made]
    assert order[-1][1] == pytest.approx(sum(pauses)), "one after another"
    waited = [r.phases["queue"] for r in run.records if r.phases and r.call == 0]
    assert max(waited) == pytest.approx(sum(pauses[:3]))


def test_a_session_whose_call_failed_makes_room(virtually: Virtually) -> None:
    made = sessions(LOAD)

    async def story() -> None:
        gate = Gate(1, made)
        await gate.enter(0)
        gate.leave(0, failed=True)
        await asyncio.wait_for(gate.enter(1), 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(gate.enter(2), 1)

    virtually(story())


def test_a_request_that_can_never_run_is_a_failure_with_its_reason(
    stand: Stand, virtually: Virtually
) -> None:
    made = sessions(LOAD)

    async def story() -> Record:
        seat = seated(stand, "independent", made)
        record = Record(run=0, session=0, call=0, member="m1", task="actor", time=0.0, scheduled=0.0)
        await seat.ask(Asking("m1", 8, ids=[100] * 3000), record)
        return record

    record = virtually(story())
    assert record.outcome == "error" and "3000" in record.told


def test_an_engine_that_breaks_ends_the_run_and_leaves_nobody_waiting(
    stand: Stand, virtually: Virtually, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, run = sessions(LOAD), Run(0, None)
    seat = seated(stand, "independent", made)

    def broken() -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(seat.engine, "step", broken)
    with pytest.raises(RuntimeError, match="out of order"):
        virtually(driven(seat, made, run))


def chunk(start: int, stop: int, *, boundary: int, prompt: int = 6) -> Any:
    request = SimpleNamespace(boundary=boundary, prompt=range(prompt))
    return SimpleNamespace(start=start, stop=stop, request=request)


def test_a_step_that_reads_and_says_decodes_as_long_as_one_that_only_says() -> None:
    sheet = Timesheet()
    # The last token of a prompt of 6 is read again, beside a token of an answer.
    sheet.note(Step((chunk(5, 6, boundary=5), chunk(7, 8, boundary=5))), 2.0)
    sheet.note(Step((chunk(6, 7, boundary=5), chunk(0, 9, boundary=9, prompt=9))), 5.0)
    sheet.idle = 1.0
    assert (sheet.prefill_rows, sheet.decode_rows) == (10, 2)
    assert sheet.shares(9.0) == {"prefill": 3.0, "decode": 4.0, "idle": 1.0, "client": 1.0}
