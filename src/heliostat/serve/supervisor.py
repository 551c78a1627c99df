"""Starts worker processes, holds them to what they should be, starts again what dies, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.serve.cluster import DECODE, Cluster, Place
from heliostat.serve.crew import Hosts
from heliostat.serve.dispatch import Dispatcher
from heliostat.serve.log import Log
from heliostat.serve.metrics_now import Standing
from heliostat.serve.protocol import Described, Stats, Worker
from heliostat.serve.roster import family_name, module_name

QUICK = 30.0
"""A worker that is ready for less seconds than this died quickly, and so did one that never was."""
MOST_QUICK = 6
"""Quick deaths in a row after which it is given up."""
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds before a worker is started again; twice as long after every quick death, and up to half of it less."""
READY_SECONDS = 300.0
"""Most seconds until a worker that was started says what it is, where nobody says otherwise: it loads its weights first."""
AWAY = 10.0
"""Seconds for which one that runs elsewhere is waited for, where another stands in for it."""
LAST_WORDS = 3.0
"""Seconds that workers have to end when the server does."""


class Running(Protocol):
    """A worker's process."""

    @property
    def worker(self) -> Worker:
        """To ask."""

    @property
    def number(self) -> int:
        """The process's, for people."""

    async def ended(self) -> str:
        """Returns when the process is gone, and nothing of it is held here any more: how."""

    async def end(self) -> None:
        """Have it end by itself; returns when it has."""

    def kill(self) -> None:
        """End it at once."""


Start = Callable[[Place, Mapping[str, str]], Awaitable[Running]]
"""Starts the worker of a place, which hosts these modules (the family's names -> digests), and reaches it.

Raises ConnectionError where it ends before that, OSError where the machine gives no process or no line to it.
"""


@dataclass(slots=True, eq=False)
class _Post:
    """A place, and how it goes there."""

    place: Place
    modules: dict[str, str]
    """What it must host: the family's names -> digests."""
    state: str = "starting"
    why: str = ""
    """How it ended last."""
    restarts: int = 0
    quick: int = 0
    running: Running | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is ready, or was given up, for the first time."""


class Supervisor:
    """A crew of processes, by a cluster whose places all have modules."""

    def __init__(
        self,
        cluster: Cluster,
        digests: Mapping[str, str],
        start: Start,
        dispatcher: Dispatcher,
        *,
        folder: Path,
        tokenizer: str,
        log: Log,
        sweep: Callable[[], None] = lambda: None,
        at_last: Callable[[], None] = lambda: None,
        ready: float = READY_SECONDS,
        dice: random.Random | None = None,
    ) -> None:
        """``digests``: of the family's modules; ``sweep`` removes what dead processes left, ``at_last`` also what
        all of them had in common; ``ready``: most seconds until one that was started says what it is."""
        self.folder = folder
        self._cluster, self._start, self._dispatcher, self._log = cluster, start, dispatcher, log
        self._sweep, self._at_last, self._ready, self._dice = sweep, at_last, ready, dice or random.Random()
        self._posts = {
            place.name: _Post(place, {name: digests[name] for name in place.modules or ()})
            for place in cluster.places
        }
        self._hosts = Hosts(folder, tokenizer, dispatcher, cluster.hosts)
        self._fit = ""
        self._tasks: list[asyncio.Task[None]] = []
        dispatcher.broke = self._broke

    @property
    def failure(self) -> str:
        """Where everybody who could answer was given up."""
        posts = [post for post in self._posts.values() if DECODE in post.place.roles]
        if all(post.state == "given up" for post in posts):
            return f"no worker is left that decodes: {posts[0].place.name} {posts[0].why}; start the server again"
        return ""

    async def start(self) -> None:
        """Returns when every worker is ready; the first that cannot be started ends all. One that runs elsewhere and is
        away is not waited for where another stands in for it."""
        loop = asyncio.get_running_loop()
        self._sweep()
        self._tasks = [loop.create_task(self._keep(post)) for post in self._posts.values()]
        for post, keeping in zip(self._posts.values(), self._tasks, strict=True):
            ready = loop.create_task(post.ready.wait())
            while not (
                await asyncio.wait({ready, keeping}, timeout=AWAY, return_when=asyncio.FIRST_COMPLETED)
            )[0]:
                if self._dispensable(post):
                    post.ready.set()  # it is as one that was lost: tried until it is there
            ready.cancel()
            if keeping.done() and keeping.exception() is not None:
                keeping.result()  # a fault of ours
            if post.state == "given up":
                await self.stop()
                raise Refused(f"worker {post.place.name!r} cannot be started: {post.why}")

    def _dispensable(self, post: _Post) -> bool:
        """Whether others run it, and another that does is up and hosts all that it does."""
        return post.place.url is not None and any(
            other.state == "up"
            and post.modules.items() <= other.modules.items()
            and set(post.place.roles) <= set(other.place.roles)
            for other in self._posts.values()
        )

    async def stop(self) -> None:
        """End all, within one budget; what has not ended by then is killed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        running = [post.running for post in self._posts.values() if post.running is not None]
        for post in self._posts.values():
            self._dispatcher.leave(post.place.name)
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await asyncio.gather(*(one.end() for one in running), return_exceptions=True)
        for one in running:
            one.kill()
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await asyncio.gather(*(one.ended() for one in running))
        self._at_last()

    # ---- one worker

    async def _keep(self, post: _Post) -> None:
        """Start it, and again whenever it has ended, until it is given up."""
        loop = asyncio.get_running_loop()
        while True:
            quick = True  # one that does not even begin
            try:
                await self._begin(post)
            except Refused as refused:
                post.why = str(refused)
            else:
                began = loop.time()
                assert post.running is not None
                self._log.say(
                    "worker ready",
                    worker=post.place.name,
                    process=post.running.number,
                    restarts=post.restarts,
                )
                post.state = "up"
                post.ready.set()
                post.why = await post.running.ended()
                quick = loop.time() - began < QUICK
            await self._lost(post, quick=quick)
            if post.state == "given up":
                return
            await asyncio.sleep(self._pause(post))
            post.restarts += 1

    async def _begin(self, post: _Post) -> None:
        """Start it and hold it to what it should be."""
        try:
            # Who runs elsewhere may come whenever its machine does.
            async with asyncio.timeout(self._ready if post.place.url is None else None):
                post.running = await self._start(post.place, post.modules)
                described = await post.running.worker.describe()
        except TimeoutError:
            raise Refused(f"it was not ready within {self._ready:g} s") from None
        except ConnectionError as error:
            raise Refused(f"it ended before it was ready ({error})") from None
        except OSError as error:
            raise Refused(f"it cannot be started here ({error})") from None
        self._refuse_stranger(post, described)
        self._dispatcher.join(post.running.worker, described)

    def _refuse_stranger(self, post: _Post, found: Described) -> None:
        name = post.place.name
        if found.worker != name:
            raise Refused(f"who answers calls itself {found.worker!r}")
        if self._fit and found.fit != self._fit:
            raise Refused(
                "its pages do not fit those of the others: shape, tokenizer, template, rope, number format or page "
                "size differ"
            )
        missing = [m for m, digest in post.modules.items() if module_name(m, digest) not in found.modules]
        if missing:
            there = ", ".join(sorted({family_name(module) for module in found.modules})) or "nothing"
            raise Refused(f"it does not host {missing[0]!r} with the family's digest; it hosts {there}")
        if set(found.roles) != set(post.place.roles):
            raise Refused(f"it has the roles {', '.join(found.roles)}, not {', '.join(post.place.roles)}")
        self._fit = found.fit

    async def _lost(self, post: _Post, *, quick: bool) -> None:
        self._dispatcher.leave(post.place.name)
        if post.running is not None:
            post.running.kill()
            await post.running.ended()  # only then is its memory nobody's
            post.running = None
        self._sweep()
        post.quick = post.quick + 1 if quick else 0
        never = not post.ready.is_set()
        # Who runs elsewhere is started again by others, whenever they like.
        given_up = never or (post.quick >= MOST_QUICK and post.place.url is None)
        post.state = "given up" if given_up else "starting"
        self._log.say("worker given up" if given_up else "worker ended", worker=post.place.name, why=post.why)
        post.ready.set()

    def _pause(self, post: _Post) -> float:
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** max(0, post.quick - 1))
        return longest * (1 - self._dice.random() / 2)

    def _broke(self, worker: str, why: str) -> None:
        """A worker's engine can answer nothing any more: its process goes, and another comes."""
        post = self._posts.get(worker)
        if post is not None and post.running is not None:
            self._log.say("worker broke", worker=worker, why=why)
            post.running.kill()

    # ---- telling, hosting

    def standing(self, stats: Mapping[str, Stats]) -> tuple[Standing, ...]:
        """How each is."""
        return tuple(self._standing(post, stats.get(name)) for name, post in self._posts.items())

    def _standing(self, post: _Post, stats: Stats | None) -> Standing:
        name, router = post.place.name, self._dispatcher.router
        decoding, ahead = router.outstanding(name)
        return Standing(
            name,
            router.state(name) if post.state == "up" else post.state,
            post.place.roles,
            tuple(post.modules),
            decoding=decoding,
            ahead=ahead,
            restarts=post.restarts,
            pages=stats.pages if stats is not None else 0,
            available=stats.available if stats is not None else 0,
        )

    def missing(self) -> Mapping[str, str]:
        """Those that are being started, or were given up."""
        return {name: post.state for name, post in self._posts.items() if post.state != "up"}

    async def host(self, source: str) -> tuple[Row, Mapping[str, str]]:
        """Where the cluster places the row's modules."""
        row, digests, wanted = await self._hosts.host(source)
        for worker, modules in wanted.items():
            self._posts[worker].modules |= modules
        return row, digests

    async def keep_only(self, needed: Collection[str]) -> None:
        """What nobody needs goes, and is not there when a worker is started again."""
        unneeded: dict[str, Sequence[str]] = {}
        for name, post in self._posts.items():
            described = self._dispatcher.described.get(name)
            there = described.modules if described is not None else {}
            unneeded[name] = sorted(there.keys() - set(needed))
            post.modules = {m: d for m, d in post.modules.items() if module_name(m, d) in needed}
        await self._dispatcher.unload(unneeded)
