"""Sessions against a server: an open loop of sessions, a closed loop inside each, and a watch on the client itself.

It knows no HTTP: whoever asks is given. All times are the event loop's, so tests run it on a virtual clock. No torch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from heliostat.bench.client import Answer, Asking
from heliostat.bench.records import Lateness, Record, Run
from heliostat.bench.workloads import Call, Session, messages, prompt_ids

Ask = Callable[[Asking, Record], Awaitable[Answer]]
RING = 0.05
"""Seconds between two looks at how late the event loop is."""


@dataclass(frozen=True, slots=True)
class Passing:
    """How prompts go out, and what is kept of them."""

    as_ids: bool = False
    """Token ids to /v1/completions; else words to /v1/chat/completions."""
    keep_prompts: bool = False
    """Records hold prompts and answers, so that ``heliostat plan`` can read them."""


async def drive(
    sessions: Sequence[Session],
    ask: Ask,
    *,
    run: Run,
    passing: Passing,
    tell: Callable[[Record], None] = lambda record: None,
) -> None:
    """Run all sessions and fill ``run``; ``tell`` hears of every request that has ended.

    A cancellation (Ctrl-C) ends it early and well: what was measured is there, and ``run.stopped`` is set.
    """
    loop = asyncio.get_running_loop()
    driver = _Driver(ask, run, passing, tell, loop.time(), time.time())
    watch = asyncio.create_task(_watch(run.lateness))
    begun, cpu = loop.time(), time.process_time()
    tasks = [asyncio.create_task(driver.session(session)) for session in sessions]
    try:
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        run.stopped = True
    finally:
        for task in (*tasks, watch):
            task.cancel()
        await asyncio.gather(*tasks, watch, return_exceptions=True)
        run.lateness.cpu, run.lateness.wall = time.process_time() - cpu, loop.time() - begun


async def _watch(lateness: Lateness) -> None:
    """A clock that rings: how much too late it does is the client's own slowness."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + RING
        await asyncio.sleep(RING)
        lateness.rings += 1
        lateness.late.append(clock() - due)


@dataclass(slots=True)
class _Driver:
    ask: Ask
    run: Run
    passing: Passing
    tell: Callable[[Record], None]
    zero: float
    """The loop's time at which the run began; ``epoch`` is everybody's."""
    epoch: float

    async def session(self, session: Session) -> None:
        """From its scheduled start to its last answer."""
        talk = _Talk(session, {call.number: asyncio.Event() for call in session.calls})
        self.run.conversations[session.number] = (
            session.number if session.conversation is None else session.conversation
        )
        tasks = [asyncio.create_task(self._call(talk, call)) for call in session.calls]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
        self.run.spans[session.number] = session.start, max(talk.ends.values())

    async def _call(self, talk: _Talk, call: Call) -> None:
        """When those before it have answered and its pause is over; not at all where one of them has failed."""
        for number in call.after:
            await talk.over[number].wait()
        ready = max((talk.ends[number] for number in call.after), default=talk.session.start)
        due = ready + call.pause
        record = Record(
            run=self.run.number,
            session=talk.session.number,
            call=call.number,
            member=call.member,
            task=call.task,
            time=self.epoch + due,
            scheduled=due,
            pause=call.pause,
            asked_tokens=call.answer_tokens,
        )
        try:
            if talk.failed & set(call.after):
                record.outcome, record.told = "skipped", "a call that it goes on from has failed"
                record.end = due
            else:
                await self._asked(talk, call, record)
        finally:
            self._over(talk, record)

    def _over(self, talk: _Talk, record: Record) -> None:
        """It has ended, well or not; what was never sent before the end of the run is no request."""
        talk.ends[record.call] = record.end
        if not record.answered:
            talk.failed.add(record.call)
        talk.over[record.call].set()
        record.seconds = max(0.0, record.end - record.scheduled)
        if record.sent is not None or record.outcome != "unfinished":
            self.run.records.append(record)
            self.tell(record)

    async def _asked(self, talk: _Talk, call: Call, record: Record) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.zero + record.scheduled - loop.time())
        asking = self._asking(talk, call)
        record.stand_ins = sum(
            part.answer_of is not None and part.answer_of not in talk.known(self.passing.as_ids)
            for part in call.prompt
        )
        if self.passing.keep_prompts:
            record.prompt = None if asking.ids is None else list(asking.ids)
            record.messages = None if asking.messages is None else [dict(m) for m in asking.messages]
        try:
            answer = await self.ask(asking, record)
        finally:
            self._from_zero(record)
        if record.answered:
            talk.texts[call.number] = answer.text
            if answer.ids is not None:
                talk.ids[call.number] = answer.ids
            if self.passing.keep_prompts:
                record.answer = answer.ids if self.passing.as_ids else answer.text

    def _asking(self, talk: _Talk, call: Call) -> Asking:
        if self.passing.as_ids:
            return Asking(call.member, call.answer_tokens, ids=prompt_ids(call, talk.ids))
        return Asking(call.member, call.answer_tokens, messages=messages(call, talk.texts))

    def _from_zero(self, record: Record) -> None:
        """The loop's times as times of the run."""
        record.end = (record.end or asyncio.get_running_loop().time()) - self.zero
        for name in ("sent", "first", "last"):
            if (value := getattr(record, name)) is not None:
                setattr(record, name, value - self.zero)


@dataclass(slots=True)
class _Talk:
    """What a session knows while it goes on."""

    session: Session
    over: dict[int, asyncio.Event]
    ends: dict[int, float] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    texts: dict[int, str] = field(default_factory=dict)
    ids: dict[int, list[int]] = field(default_factory=dict)

    def known(self, as_ids: bool) -> Mapping[int, object]:
        """Answers that a prompt can go on from, as they were said."""
        return self.ids if as_ids else self.texts
