"""A worker that is a vLLM server, asked over HTTP: the row decides which module of which server runs what.

A prompt is written at its prompt_writer's server by a completion of everything below the boundary; the answer is a
stream of the server that has the answer_writer and the speaker, which loads exactly those positions and computes the
rest. What was not transferred is never computed by another module: the request fails, and may be tried again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from heliostat.engine.answer import Spoken
from heliostat.errors import Refused
from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.http_answer import Answer, failed_by, heard_of, silent
from heliostat.serve.http_facts import Expected, described_of
from heliostat.serve.http_line import HttpLine, Refusal
from heliostat.serve.http_orders import ELSEWHERE, beyond, completion, decoded, sampled_of
from heliostat.serve.http_watch import BEAT, PATIENCE, Watch
from heliostat.serve.protocol import (
    Described,
    Failed,
    Handed,
    Handle,
    Hear,
    Order,
    Spent,
    Stats,
    content_of,
    no,
)
from heliostat.vllm import versions, wire

LEASE = 60.0
"""Seconds for which it keeps what was written for others, and within which whoever loads that must have begun to speak."""
COMPLETIONS = "/v1/completions"
DRAIN_LOOK = 0.05


@dataclass(slots=True, eq=False)
class _Call:
    """An order that is asked there."""

    member: str
    task: asyncio.Task[Any] | None = None
    failed: Failed | None = None
    """Why it was ended from here; None: nobody wants it any more."""


class HttpWorker:
    """Implements ``protocol.Worker``; works from ``start`` to ``close``."""

    def __init__(
        self,
        line: HttpLine,
        expected: Expected,
        tokenizer: Tokenizer,
        *,
        patience: float = PATIENCE,
        beat: float = BEAT,
    ) -> None:
        """``expected``: what the cluster file says of it; who is not that is refused."""
        self._line, self._expected, self._tokenizer = line, expected, tokenizer
        self._watch, self._patience = Watch(line, expected.worker, patience=patience, beat=beat), patience
        self._facts: wire.Described | None = None
        self._offered: dict[str, str] = {}
        self._calls: dict[str, _Call] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._gone = ""
        self._draining = False
        self._beating: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look after it, on the loop that is running."""
        self._loop = asyncio.get_running_loop()
        self._watch.start(self._loop)
        self._beating = self._loop.create_task(self._beat())

    @property
    def silent(self) -> float:
        """Seconds since the last word."""
        return self._watch.silent

    @property
    def gone(self) -> str:
        """Why nothing can be asked of it any more; empty while all is well."""
        return self._gone

    # ---- what it is

    async def describe(self) -> Described:
        """What it is now. Refused where that is not what the cluster says."""
        if self._gone:
            raise ConnectionError(self._gone)
        if self._facts is None:
            facts = await self._watch.look()
            versions.refuse_unsupported(facts.vllm)
            self._expected.refuse_other(facts)
            self._watch.incarnation = facts.incarnation
            self._facts, self._offered = facts, dict(self._expected.modules)
        return described_of(self._expected, self._facts, self._offered, draining=self._draining)

    async def _beat(self) -> None:
        self.lost(await self._watch.lost())

    # ---- orders

    async def prefill(self, order: Order) -> Handed | Failed:
        """Have the positions below the boundary written, for whoever decodes it."""
        row, said = order.row, len(order.answer)
        speaks = row.boundary(len(order.prompt)) == len(order.prompt)
        failed = self._objection(order, (row.prompt_writer,), said=max(said, speaks))
        if failed is not None:
            return failed
        call = self._begin(order)
        work = self._loop.create_task(self._prefilled(order))
        call.task = work
        try:
            return await work
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                work.cancel()
                raise
            return call.failed or no(order.id, "aborted", "it was aborted")
        finally:
            self._calls.pop(order.id, None)

    async def decode(self, order: Order, hear: Hear, handle: Handle | None = None) -> Failed | None:
        """Take a request in, and run it to its end."""
        row = order.row
        needed = {row.answer_writer, row.speaker}
        if handle is None and row.boundary(len(order.prompt)):
            needed.add(row.prompt_writer)
        failed = self._objection(order, sorted(needed), said=len(order.answer))
        failed = failed or self._mismatch(order, handle)
        if failed is not None:
            return failed
        call = self._begin(order)
        call.task = self._loop.create_task(self._decoded(order, hear, handle, call))
        return None

    def _begin(self, order: Order) -> _Call:
        call = self._calls[order.id] = _Call(order.member)
        return call

    def _mismatch(self, order: Order, handle: Handle | None) -> Failed | None:
        """Why this server's modules, or what was written elsewhere, are not what the order's row is made of."""
        row, name = order.row, self._expected.worker
        if self._writer(row.speaker) != order.digests.get(row.answer_writer):
            why = f"worker {name!r} does not write with {row.answer_writer!r} what {row.speaker!r} speaks"
            return no(order.id, "module_missing", why)
        if handle is None and not self._plain(order):
            why = f"worker {name!r} cannot both read a prompt with {row.prompt_writer!r} and answer it"
            return no(order.id, "module_missing", why)
        if handle is not None and handle.content != content_of(order):
            return no(
                order.id, "pages_gone", "the handle is of another writer, other tokens or another tenant"
            )
        return None

    def _objection(self, order: Order, needed: Sequence[str], *, said: int) -> Failed | None:
        """Why an order cannot be asked here."""
        if self._gone:
            return no(order.id, "worker_lost", self._gone)
        if self._draining:
            return no(order.id, "draining", "this worker is shutting down")
        for name in needed:
            if self._offered.get(name) is None or self._offered[name] != order.digests.get(name):
                why = f"worker {self._expected.worker!r} does not host {name!r} with the weights asked for"
                return no(order.id, "module_missing", why)
        why = beyond(order, said=said)
        if why and order.answer:  # it was taken in, and cannot be gone on with
            return Failed(order.id, 503, "worker_lost", why, retry=False)
        return no(order.id, "refused", why) if why else None

    def _writer(self, speaker: str) -> str | None:
        """Digest of who writes there where ``speaker`` speaks."""
        return self._facts.writers.get(speaker) if self._facts is not None else None

    async def _prefilled(self, order: Order) -> Handed | Failed:
        try:
            async with asyncio.timeout(order.seconds):
                return await self._written(order)
        except TimeoutError:
            return no(order.id, "deadline", "not answered within its deadline")
        except Refusal as refusal:
            return failed_by(order, refusal)
        except ConnectionError as error:
            return no(order.id, "worker_lost", self._gone or f"the connection broke ({error})")

    async def _written(self, order: Order) -> Handed | Failed:
        """The positions below the boundary, and the first token where their writer chooses it."""
        began, row = self._loop.time(), order.row
        boundary = row.boundary(len(order.prompt))
        speaks = boundary == len(order.prompt) and not order.answer
        asked = order if speaks else silent(order)
        body = completion(
            asked,
            model=row.prompt_writer,
            prompt=order.prompt[:boundary],
            most=1,
            eos=self._tokenizer.eos_ids,
            stream=False,
        )
        body |= {wire.PARAMS: wire.keep(order.digests[row.prompt_writer], boundary), **self._salted(order)}
        reply = await self._line.post(COMPLETIONS, body)
        try:
            found = decoded(reply)
            sampled = sampled_of(found.choices[0])[:1]
            wire.load(found.kv_transfer_params, order.digests[row.prompt_writer], boundary)
        except (msgspec.DecodeError, ValueError, IndexError, Refused) as error:
            return no(order.id, "worker_lost", f"the server handed nothing over: {error}")
        cached = found.usage.cached if found.usage is not None else 0
        spent = Spent(ran=self._loop.time() - began, computed=max(0, boundary - cached), cached=cached)
        first = None
        if speaks:
            if not sampled:
                return no(order.id, "worker_lost", "the server said no token")
            first = self._answer(order).say(sampled[0], None, self._loop.time())
            if first.finish is not None:
                self._later(self._released(found.kv_transfer_params or {}))
                return Handed(order.id, None, spent, first)
        return Handed(order.id, self._handle(order, boundary, found.kv_transfer_params or {}), spent, first)

    def _handle(self, order: Order, boundary: int, transfer: Mapping[str, Any]) -> Handle:
        assert self._facts is not None
        return Handle(
            order=order.id,
            worker=self._expected.worker,
            incarnation=self._facts.incarnation,
            fit=self._facts.fit,
            content=content_of(order),
            store="",
            tokens=boundary,
            pages=(),
            generations=(),
            digests=(),
            lease=LEASE,
            transfer=msgspec.json.encode(transfer).decode(),
        )

    async def _decoded(self, order: Order, hear: Hear, handle: Handle | None, call: _Call) -> None:
        try:
            async with asyncio.timeout(order.seconds):
                failed = await self._spoken(order, hear, handle)
        except TimeoutError:
            failed = no(order.id, "deadline", "not answered within its deadline")
        except asyncio.CancelledError:
            failed = call.failed
        finally:
            self._calls.pop(order.id, None)
        if failed is not None:
            hear(failed)

    async def _spoken(self, order: Order, hear: Hear, handle: Handle | None) -> Failed | None:
        row = order.row
        answer = self._answer(order)
        writer, boundary = order.digests[row.prompt_writer], row.boundary(len(order.prompt))
        body = completion(
            order,
            model=row.speaker,
            prompt=(*order.prompt, *order.answer),
            most=answer.most,
            eos=self._tokenizer.eos_ids,
            stream=True,
        )
        try:
            if handle is None:
                params = wire.alone(order.digests[row.answer_writer])
            else:
                params = wire.load(msgspec.json.decode(handle.transfer), writer, boundary)
        except Refused as refused:
            return no(order.id, "pages_gone", str(refused))
        body |= {wire.PARAMS: params, **self._salted(order)}
        return await self._streamed(answer, body, hear, fetches=handle is not None)

    def _salted(self, order: Order) -> dict[str, str]:
        salt = wire.salt(order.salt)
        return {} if salt is None else {"cache_salt": salt}

    def _plain(self, order: Order) -> bool:
        """Whether one completion is all of it: who writes the prompt writes the answer, too."""
        row = order.row
        return not row.boundary(len(order.prompt)) or row.prompt_writer == row.answer_writer

    def _answer(self, order: Order) -> Answer:
        spoken = Spoken.begin(self._tokenizer, order.sampling.stop)
        return Answer(order, frozenset(self._tokenizer.eos_ids), spoken, self._loop.time())

    async def _streamed(
        self, answer: Answer, body: Mapping[str, Any], hear: Hear, *, fetches: bool
    ) -> Failed | None:
        order = answer.order
        try:
            async with (
                asyncio.timeout(LEASE if fetches else None) as lease,
                aclosing(self._line.stream(COMPLETIONS, body)) as events,
            ):
                async for said in heard_of(answer, events, self._loop.time):
                    lease.reschedule(None)
                    self._watch.heard()
                    hear(said)
                    if said.finish is not None:
                        return None
        except TimeoutError:
            return no(order.id, "late", "what was written for it was not loaded within its lease")
        except Refusal as refusal:
            return failed_by(order, refusal, fetches=fetches and not answer.spoke)
        except (msgspec.DecodeError, ValueError) as error:
            return no(order.id, "worker_lost", f"the server's words make no sense: {error}")
        except ConnectionError as error:
            return no(order.id, "worker_lost", self._gone or f"the connection broke ({error})")
        return no(order.id, "worker_lost", "the stream ended before the answer did")

    # ---- ends

    def abort(self, order: str) -> None:
        """End an order wherever it stands: its connection is closed, by which the server knows."""
        call = self._calls.pop(order, None)
        if call is not None and call.task is not None:
            call.task.cancel()

    def release(self, handle: Handle) -> None:
        """What was written for others is needed no more."""
        if self._facts is None or handle.incarnation != self._facts.incarnation or self._gone:
            return
        self._later(self._released(msgspec.json.decode(handle.transfer)))

    async def _released(self, transfer: Mapping[str, Any]) -> None:
        with suppress(ConnectionError, Refusal, TimeoutError):  # its lease makes it good
            async with asyncio.timeout(self._patience):
                await self._line.post(wire.RELEASE, {"handle": transfer.get("handle")})

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def lost(self, why: str) -> None:
        """It is dead, as its owner knows: all that is open fails now, and so does what is asked from now on."""
        self._gone = self._gone or why
        for order, call in list(self._calls.items()):
            call.failed = no(order, "worker_lost", why)
            if call.task is not None:
                call.task.cancel()

    # ---- the worker itself

    async def stats(self) -> Stats:
        """What it is doing, as far as is known from here."""
        described = await self.describe()
        members = Counter(call.member for call in self._calls.values())
        used = min(described.pages, round(await self._used() * described.pages))
        return Stats(running=dict(members), pages=described.pages, available=described.pages - used)

    async def _used(self) -> float:
        """The part of its pages that is in use."""
        with suppress(Refusal, ValueError):
            for line in (await self._line.get("/metrics")).decode("utf-8", "replace").splitlines():
                if line.startswith("vllm:kv_cache_usage_perc"):
                    return max(0.0, min(1.0, float(line.rpartition(" ")[2])))
        return 0.0

    async def load(self, modules: Mapping[str, str]) -> Described:
        """A server holds what it was started with."""
        raise Refused(
            f"worker {self._expected.worker!r} is a vLLM server, which holds what it was started with, and not "
            f"{', '.join(sorted(modules))}: export the family again and start the cluster anew, or {ELSEWHERE}"
        )

    async def unload(self, modules: Sequence[str]) -> Described:
        """Modules are offered no more; the server keeps them until it ends."""
        self._offered = {name: digest for name, digest in self._offered.items() if name not in modules}
        return await self.describe()

    async def drain(self) -> None:
        """Take nothing more in, and wait until all is done."""
        self._draining = True
        while self._calls:
            await asyncio.sleep(DRAIN_LOOK)

    async def close(self) -> None:
        """End it from here; the server itself may live on."""
        self.lost("the worker is closed")
        if self._beating is not None:
            self._beating.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._line.close()
