"""From a request to its answer: finds workers, sends orders, moves on where a worker fails, ends what is unwanted.

The only way in which the server reaches an engine. Lives on the event loop, and its time is the loop's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from heliostat.errors import Refused
from heliostat.serve.dispatch_asked import Asked, Attempt, Open
from heliostat.serve.dispatch_queue import Queue
from heliostat.serve.metrics import Metrics
from heliostat.serve.protocol import Described, Failed, Handed, Order, Said, Stats, Worker
from heliostat.serve.router import Router, Wish
from heliostat.serve.trouble import Trouble

TRIES = 8
"""Most attempts for one request."""
PAUSE = 0.05
"""Seconds before the third attempt; twice as long before each after it, up to a second."""
HEALTHY = frozenset({"refused", "schema", "busy", "draining", "deadline", "member_failed", "pages_lost"})
"""Failures that say nothing against the worker."""
LOOK_SECONDS = 2.0
"""Longest that somebody who only looks waits for a worker."""


class Dispatcher:
    """Takes requests in while there is room, and answers every one of them, one way or another."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        max_waiting: int = 256,
        deadline: float | None = None,
        patience: float = 60.0,
    ) -> None:
        """At most ``max_waiting`` requests beyond those that workers can run at a time; ``deadline``: most seconds
        for one; ``patience``: most seconds for which one waits where no worker is there for it."""
        self.metrics, self.max_waiting, self.deadline = metrics, max_waiting, deadline
        self.router = Router()
        self.workers: dict[str, Worker] = {}
        self.described: dict[str, Described] = {}
        self.failure = ""
        """Why nothing can be answered any more; empty while all is well."""
        self.broke: Callable[[str, str], None] = self._broke
        """Told (worker, why) where one can answer nothing any more; by default nothing can be, then."""
        self.max_length, self.page_size = 0, 1
        """Most tokens of a request that every worker takes, and positions of a page (equal everywhere, or pages could
        not travel); while no worker is there as they were last."""
        self._open: dict[str, Open] = {}
        self._queue = Queue(self.router, patience=patience)

    # ---- workers

    def join(self, worker: Worker, described: Described) -> None:
        """A worker is ready, or says anew what it hosts."""
        if described.worker in self.workers and self.workers[described.worker] is not worker:
            self.leave(described.worker)
        self.workers[described.worker], self.described[described.worker] = worker, described
        self._measure()
        self.router.join(described)
        self._queue.changed()

    def leave(self, name: str) -> None:
        """A worker gets nothing more."""
        self.router.leave(name)
        self.workers.pop(name, None)
        self.described.pop(name, None)
        self._measure()

    def _measure(self) -> None:
        if self.described:
            self.max_length = min(d.max_length for d in self.described.values())
            self.page_size = next(d.page_size for d in self.described.values())

    @property
    def most(self) -> int:
        """Requests that are taken in at most."""
        running = sum(d.max_running for d in self.described.values() if "decode" in d.roles)
        return running + self.max_waiting

    def _broke(self, worker: str, why: str) -> None:
        self.failure = why
        for open_ in list(self._open.values()):
            self._fail(open_, Trouble(503, why, code="engine_failed"))

    # ---- clients

    @property
    def unfinished(self) -> int:
        """Requests that were taken in and have not ended."""
        return len(self._open)

    @property
    def waiting(self) -> int:
        """Of these, those that no worker has yet."""
        return len(self._queue)

    def members_waiting(self) -> list[str]:
        """Whose they are."""
        return self._queue.members()

    def ask(self, orders: Sequence[Order]) -> Asked:
        """Take requests in, all or none; nobody has to wait for this. Raises Trouble (429 full, 503 failed)."""
        self.refuse_if_full(len(orders))
        loop = asyncio.get_running_loop()
        now, asked = loop.time(), Asked()
        until = None if self.deadline is None else now + self.deadline
        asked.requests = tuple(Open(order, asked, place, now, until) for place, order in enumerate(orders))
        for open_ in asked.requests:
            self._open[open_.id] = open_
            self.metrics.begin(open_)
            open_.task = loop.create_task(self._answer(open_))
        return asked

    def refuse_if_full(self, count: int) -> None:
        """Raise Trouble where so many more requests have no room, or nothing can be answered any more."""
        if self.failure:
            raise Trouble(503, self.failure, code="engine_failed")
        if self.unfinished + count > self.most:
            raise Trouble(
                429,
                f"the queue is full: {self.unfinished} of {self.most} requests are unfinished; try again soon",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def abort(self, asked: Asked) -> None:
        """End what is unfinished of it, wherever it stands."""
        for open_ in asked.requests:
            if self._end(open_) and open_.task is not None:
                open_.task.cancel()

    async def stop(self) -> None:
        """Abort what is unfinished, and let go of the workers' answers."""
        tasks = [open_.task for open_ in self._open.values() if open_.task is not None]
        for open_ in list(self._open.values()):
            self.abort(open_.asked)
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, open_: Open) -> bool:
        """It is over; False if it was already."""
        if open_.ended:
            return False
        open_.ended = True
        del self._open[open_.id]
        return True

    def _fail(self, open_: Open, trouble: Trouble | Refused) -> None:
        """The client is told; its other requests end with this one."""
        if self._end(open_):
            open_.asked.inbox.put_nowait(trouble)
            self.abort(open_.asked)
            if open_.task is not None and open_.task is not asyncio.current_task():
                open_.task.cancel()

    # ---- one request

    async def _answer(self, open_: Open) -> None:
        """Until it is answered, or cannot be."""
        shunned: dict[str, None] = {}
        last = ""
        try:
            async with asyncio.timeout_at(open_.until):
                while not open_.ended:
                    failed = await self._attempt(open_, shunned)
                    if failed is None or open_.ended:
                        return
                    if not failed.retry or open_.tries >= TRIES:
                        return self._fail(open_, _told(failed))
                    last = failed.reason
                    self.metrics.retried(open_, failed.code)
                    if open_.tries > 1:
                        await asyncio.sleep(min(1.0, PAUSE * 2 ** (open_.tries - 2)))
        except TimeoutError:
            why = open_.waits_for or last
            text = f"not answered within the deadline of {self.deadline:g} s{': ' if why else ''}{why}"
            self._fail(open_, Trouble(503, text, code="deadline"))
        except Trouble as trouble:
            self._fail(open_, trouble)
        except Exception as error:
            self._fail(open_, Trouble(500, f"a fault of the server ({type(error).__name__})", code="fault"))
            raise

    async def _attempt(self, open_: Open, shunned: dict[str, None]) -> Failed | None:
        """Ask workers once; None: it has been answered to its end."""
        clock = asyncio.get_running_loop().time
        order = open_.attempt(began := clock())
        route = await self._queue.place(open_, Wish(order, self.page_size), shunned)
        open_.placed(clock() - began)
        attempt = Attempt(order, route)
        try:
            failed = await self._run(open_, attempt)
            # Before the next ones are placed: they need not run into the same.
            if failed is not None:
                self._judge(attempt.blamed(failed), failed, shunned)
            else:
                self.router.well(route.decode)
            return failed
        except BaseException:
            self._abandon(attempt)
            raise
        finally:
            self.router.ended(order.id, open_.answer if open_.ended else ())
            self.metrics.decoded(open_, route.decode, clock())
            open_.left()
            self._queue.changed()

    async def _run(self, open_: Open, attempt: Attempt) -> Failed | None:
        order, route = attempt.order, attempt.route
        decoder = self.workers.get(route.decode)
        writer = self.workers.get(route.prefill or route.decode)
        if decoder is None or writer is None:
            return attempt.lost("the worker went away")
        if writer is not decoder:
            handed = await writer.prefill(order)
            if isinstance(handed, Failed):
                return handed
            if self._taken(open_, attempt, handed):
                return None
            order = open_.known(order)
        attempt.reached = True
        refused = await decoder.decode(order, partial(self._hear, open_, attempt), attempt.handle)
        if refused is not None:
            self._let_go(attempt)
            return refused
        return await attempt.over

    def _taken(self, open_: Open, attempt: Attempt, handed: Handed) -> bool:
        """Note what a prefill brought; True where that was all."""
        name = attempt.route.prefill or attempt.route.decode
        attempt.handle = handed.handle
        open_.note(handed.spent)
        self.router.prefilled(attempt.order.id, handed.spent)
        self.router.well(name)
        self._queue.changed()
        self.metrics.prefilled(open_, handed.spent, name)
        if handed.first is None:
            return False
        self._heard(open_, handed.first)
        return handed.first.finish is not None

    def _hear(self, open_: Open, attempt: Attempt, found: Said | Failed) -> None:
        """From who decodes, on the loop."""
        if attempt.over.done():
            return
        if isinstance(found, Failed):
            self._let_go(attempt)
            attempt.over.set_result(found)
            return
        if found.number != len(open_.answer):
            self._abandon(attempt)
            attempt.over.set_result(
                attempt.lost(f"token {len(open_.answer)} of the answer was lost on its way")
            )
            return
        if not attempt.arrived:
            self._arrive(open_, attempt, found)
        elif found.spent is not None and attempt.route.prefill is None:
            open_.found(found.spent)
        self._heard(open_, found)
        if found.finish is not None:
            attempt.over.set_result(None)

    def _arrive(self, open_: Open, attempt: Attempt, said: Said) -> None:
        """The first token of who decodes: the pages of who prefilled are needed no more."""
        attempt.arrived = True
        self.router.arrived(attempt.order.id, said.spent)
        self._let_go(attempt)
        open_.decoding = asyncio.get_running_loop().time()
        if said.spent is not None:
            if attempt.route.prefill is None:
                open_.note(said.spent)
                self.metrics.prefilled(open_, said.spent, attempt.route.decode)
            else:
                open_.moved(said.spent)
                self.metrics.moved(open_, said.spent, attempt.route.decode)
        self._queue.changed()

    def _let_go(self, attempt: Attempt) -> None:
        writer = self.workers.get(attempt.route.prefill or "")
        if writer is not None and attempt.handle is not None:
            writer.release(attempt.handle)
        attempt.handle = None

    def _abandon(self, attempt: Attempt) -> None:
        """Nobody wants it any more, wherever it stands."""
        for name in attempt.route.names:
            if (worker := self.workers.get(name)) is not None:
                worker.abort(attempt.order.id)

    def _judge(self, name: str, failed: Failed, shunned: dict[str, None]) -> None:
        """What a failure says of the worker that told it."""
        shunned[name] = None
        if failed.code == "engine_failed" and name in self.workers:
            self.leave(name)
            self.broke(name, failed.reason)
        elif failed.code == "draining":
            self.leave(name)
        elif failed.code not in HEALTHY:
            self.router.failed(name, asyncio.get_running_loop().time())

    def _heard(self, open_: Open, said: Said) -> None:
        """A token for the client."""
        now = asyncio.get_running_loop().time()
        self.metrics.said(open_, said, now)
        open_.hear(said, now)
        if said.finish is not None:
            self._end(open_)

    # ---- looking, loading

    async def stats(self) -> Mapping[str, Stats]:
        """What every worker is doing, of those that say so in time."""
        found: dict[str, Stats] = {}

        async def ask(name: str, worker: Worker) -> None:
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(LOOK_SECONDS):
                    stats = await worker.stats()
                    if self.workers.get(name) is worker:
                        found[name] = stats

        await asyncio.gather(*(ask(name, worker) for name, worker in list(self.workers.items())))
        return found

    async def load(self, modules: Mapping[str, Mapping[str, str]]) -> Mapping[str, Described]:
        """Have workers (by name) host more: the family's names -> digests. All of them, or none.
        Trouble (503) where one is not there."""
        before, found = dict(self.described), {}
        try:
            for name, wanted in modules.items():
                if not wanted:
                    continue
                found[name] = await self._loaded(name, wanted)
        except BaseException:
            for name, described in found.items():
                new = described.modules.keys() - before[name].modules.keys()
                with suppress(Refused, ConnectionError, KeyError):
                    self.join(self.workers[name], await self.workers[name].unload(sorted(new)))
            raise
        return found

    async def unload(self, unneeded: Mapping[str, Sequence[str]]) -> None:
        """Have workers let modules go, by the engine's names. Who is not there has none."""
        for name, modules in unneeded.items():
            if name in self.workers and modules:
                with suppress(ConnectionError):
                    self.join(self.workers[name], await self.workers[name].unload(modules))

    async def _loaded(self, name: str, wanted: Mapping[str, str]) -> Described:
        """A worker after it took modules in. Trouble (503) where it is not there, or not any more."""
        worker = self.workers.get(name)
        if worker is not None:
            with suppress(ConnectionError):
                described = await worker.load(wanted)
                if self.workers.get(name) is worker:
                    self.join(worker, described)
                    return described
        text = f"worker {name!r} is not there now: try again when it is back"
        raise Trouble(503, text, code="worker_lost", headers={"Retry-After": "5"})


def _told(failed: Failed) -> Trouble | Refused:
    """What a client is told of a failure."""
    if failed.code == "refused":
        return Refused(failed.reason)
    return Trouble(
        failed.status, failed.reason, "response_format" if failed.code == "schema" else None, failed.code
    )
