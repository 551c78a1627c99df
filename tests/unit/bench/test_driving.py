"""Sessions on a virtual clock: an open loop outside, a closed loop inside, failures, Ctrl-C, the client's own lag."""

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from heliostat.bench.client import Answer, Asking
from heliostat.bench.driving import Ask, Passing, drive
from heliostat.bench.records import ANSWERED, Limits, Record, Run
from heliostat.bench.workloads import Call, Lengths, Load, Part, Session, sessions

Virtually = Callable[..., Any]


class Served:
    """A server of one request at a time: prefill takes a second, each token a tenth."""

    def __init__(self, *, fail: str = "", batch: int = 10**6) -> None:
        self.asked: list[Asking] = []
        self.fail = fail
        self.room = asyncio.Semaphore(batch)

    async def ask(self, asking: Asking, record: Record) -> Answer:
        clock = asyncio.get_running_loop().time
        self.asked.append(asking)
        record.sent = clock()
        async with self.room:
            await asyncio.sleep(1.0)
            record.first = clock()
            await asyncio.sleep(0.1 * (asking.max_tokens - 1))
            record.last = record.end = clock()
        record.prompt_tokens, record.answer_tokens = 10, asking.max_tokens
        record.outcome = "status 500" if record.task == self.fail else ANSWERED
        return Answer(f"said {record.call}", [record.call] * 2)


def driven(virtually: Virtually, made: list[Session], ask: Ask, **passing: Any) -> Run:
    run = Run(0, 1.0)
    virtually(drive(made, ask, run=run, passing=Passing(**passing)))
    return run


def call(number: int, *after: int, pause: float = 0.0, task: str = "t", tokens: int = 11) -> Call:
    prompt = (Part("user", (9,)), *(Part("assistant", (0,), n) for n in after))
    return Call(
        number=number, member="a", task=task, prompt=prompt, answer_tokens=tokens, after=after, pause=pause
    )


def test_a_closed_loop_inside_a_session(virtually: Virtually) -> None:
    server = Served()
    made = [Session(0, 5.0, (call(0), call(1, 0, pause=3.0), call(2, 0), call(3, 0, 1, 2)))]
    run = driven(virtually, made, server.ask)
    by_call = {record.call: record for record in run.records}
    assert [by_call[n].scheduled for n in range(4)] == pytest.approx([5.0, 10.0, 7.0, 12.0])
    assert all(
        record.ttft == pytest.approx(1.0) and record.tpot == pytest.approx(0.1) for record in run.records
    )
    assert list(run.spans) == [0] and run.spans[0] == pytest.approx((5.0, 14.0))
    assert by_call[1].seconds == pytest.approx(2.0), "a pause is not the server's"


def test_an_open_loop_of_sessions_waits_for_nobody(virtually: Virtually) -> None:
    server = Served(batch=1)
    made = [Session(n, 0.5 * n, (call(0),)) for n in range(6)]
    run = driven(virtually, made, server.ask)
    assert sorted(record.sent or 0.0 for record in run.records) == pytest.approx([0.5 * n for n in range(6)])
    # One after the other, two seconds each: the queue is in the time to the first text.
    assert sorted(record.ttft or 0.0 for record in run.records) == pytest.approx(
        [1 + 1.5 * n for n in range(6)]
    )
    assert all(record.lag == pytest.approx(0.0) for record in run.records)
    assert sum(record.meets(Limits(ttft=3.0)) for record in run.records) == 2
    assert not any(record.meets(Limits(ttft=99, tpot=0.05)) for record in run.records)


def test_answers_go_into_the_prompts_that_follow(virtually: Virtually) -> None:
    made = [Session(0, 0.0, (call(0), call(1, 0)))]
    server = Served()
    run = driven(virtually, made, server.ask, as_ids=True, keep_prompts=True)
    assert [list(asking.ids or ()) for asking in server.asked] == [[9], [9, 0, 0]]
    assert run.records[1].prompt == [9, 0, 0] and run.records[1].answer == [1, 1]
    server = Served()
    run = driven(virtually, made, server.ask, keep_prompts=True)
    assert (server.asked[1].messages or [])[1] == {"role": "assistant", "content": "said 0"}
    assert run.records[1].messages is not None and run.records[1].stand_ins == 0


def test_answers_without_ids_are_stood_in_for_and_counted(virtually: Virtually) -> None:
    server = Served()

    async def ask(asking: Asking, record: Record) -> Answer:
        return Answer((await server.ask(asking, record)).text)

    run = driven(virtually, [Session(0, 0.0, (call(0), call(1, 0)))], ask, as_ids=True)
    assert [record.stand_ins for record in run.records] == [0, 1]


def test_what_goes_on_from_a_failure_is_not_asked_and_is_no_success(virtually: Virtually) -> None:
    server = Served(fail="bad")
    made = [Session(0, 0.0, (call(0, task="bad"), call(1, 0), call(2, 0, 1))), Session(1, 0.0, (call(0),))]
    run = driven(virtually, made, server.ask)
    assert sorted(record.outcome for record in run.records) == [
        "answered",
        "skipped",
        "skipped",
        "status 500",
    ]
    assert len(server.asked) == 2 and len(run.spans) == 2
    assert not any(record.meets(Limits()) for record in run.records if record.outcome == "skipped")


def test_ctrl_c_keeps_what_was_measured(virtually: Virtually) -> None:
    server, run = Served(), Run(0, 1.0)
    heard: list[Record] = []

    async def ask(asking: Asking, record: Record) -> Answer:
        if len(server.asked) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return await server.ask(asking, record)

    made = [Session(n, 10.0 * n, (call(0),)) for n in range(9)]
    virtually(drive(made, ask, run=run, passing=Passing(), tell=heard.append))
    assert run.stopped
    assert [record.outcome for record in run.records] == ["answered", "answered", "unfinished"]
    assert len(heard) == 3 and len(run.spans) == 2


def test_a_client_that_is_late_says_so(virtually: Virtually) -> None:
    server, run = Served(), Run(0, 1.0)

    async def work() -> None:
        loop: Any = asyncio.get_running_loop()

        async def hog() -> None:
            await asyncio.sleep(0.9)
            loop._waiting.now += 0.7  # as if something else had held the loop

        task = asyncio.create_task(hog())
        await drive([Session(0, 1.0, (call(0),))], server.ask, run=run, passing=Passing())
        await task

    virtually(work())
    assert run.records[0].lag == pytest.approx(0.6, abs=0.06)
    assert run.records[0].ttft == pytest.approx(1.6, abs=0.06), (
        "from when it was due, not from when it was sent"
    )
    assert max(run.lateness.late) == pytest.approx(0.65, abs=0.06)
    assert run.lateness.rings >= 10


def test_a_whole_workflow_under_load(virtually: Virtually) -> None:
    load = Load(
        members=("a", "b", "c"), workflow="fanout", sessions=30, rate=2.0, lengths=Lengths(context=20)
    )
    made, server = sessions(load), Served(batch=4)
    run = driven(virtually, made, server.ask)
    assert len(run.records) == sum(len(session.calls) for session in made)
    for session in made:
        ends = {r.call: r.end for r in run.records if r.session == session.number}
        for each in session.calls:
            due = next(
                r for r in run.records if (r.session, r.call) == (session.number, each.number)
            ).scheduled
            before = max((ends[n] for n in each.after), default=session.start)
            assert due == pytest.approx(before + each.pause)
