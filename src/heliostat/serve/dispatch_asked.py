"""What a client asked for while it is being answered: its requests, what was heard of each, and what ended it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field

from msgspec.structs import replace

from heliostat.engine.speculation.rule import Speculated
from heliostat.errors import Refused
from heliostat.serve.protocol import Failed, Handle, Order, Said, Spent
from heliostat.serve.router import Route
from heliostat.serve.trouble import Trouble

Found = tuple[int, Said] | Trouble | Refused


@dataclass(slots=True)
class Phases:
    """Seconds of a request by what it waited for, over all its attempts; the rest is the way between processes."""

    queue: float = 0.0
    """For a worker, and at each for its turn."""
    prefill: float = 0.0
    """From its turn until its prompt was run; where one worker does all, until its first token."""
    transfer: float = 0.0
    """From its turn at who decodes until its pages were there; steps for others in between are part of it."""
    decode: float = 0.0
    """After that, to its last token. Who is preempted waits here, too."""


@dataclass(slots=True, eq=False)
class Open:
    """One request, from when it came in until it has ended, whoever works for it meanwhile."""

    order: Order
    """As it came in: without an answer."""
    asked: Asked
    place: int
    """Which of the client's requests."""
    began: float
    until: float | None
    """When it must have been answered, in the loop's time."""
    answer: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    preemptions: int = 0
    speculated: Speculated = field(default_factory=Speculated)
    """Over all attempts."""
    tries: int = 0
    waits_for: str = ""
    """Why no worker has it; empty where one has."""
    placing: float = 0.0
    """Seconds for which the latest attempt waited for a worker."""
    decoding: float | None = None
    """When the first token came from who decodes it now."""
    phases: Phases = field(default_factory=Phases)
    """Up to ``decoding``."""
    last: float | None = None
    """When the latest token came."""
    ended: bool = False
    task: asyncio.Task[None] | None = None

    @property
    def id(self) -> str:
        """Of the request; each attempt's order has one of its own."""
        return self.order.id

    @property
    def member(self) -> str:
        """Whose it is."""
        return self.order.member

    @property
    def prompt(self) -> Sequence[int]:
        """Token ids."""
        return self.order.prompt

    def attempt(self, now: float) -> Order:
        """The order that goes on from what has been heard, under a new id: words of earlier attempts are others'."""
        self.tries += 1
        left = None if self.until is None else max(0.0, self.until - now)
        name = f"{self.id}~{self.tries}"
        return replace(self.order, id=name, answer=tuple(self.answer), seconds=left)

    def known(self, order: Order) -> Order:
        """An attempt's order with all that has been said by now."""
        return replace(order, answer=tuple(self.answer)) if len(order.answer) < len(self.answer) else order

    def hear(self, said: Said, now: float) -> None:
        """One more token, for the client."""
        self.answer.append(said.sampled.token)
        if said.speculated is not None:
            self.speculated.add(*said.speculated)
        self.last, self.preemptions = now, max(self.preemptions, said.preemptions)
        self.asked.inbox.put_nowait((self.place, said))

    def placed(self, seconds: float) -> None:
        """A worker was found for the latest attempt."""
        self.placing = seconds
        self.phases.queue += seconds

    def note(self, spent: Spent) -> None:
        """What its prompt took; who asks again later finds its own pages, which nobody else's request left there."""
        self.phases.queue += spent.waited
        self.phases.prefill += spent.ran
        self.found(spent)

    def found(self, spent: Spent) -> None:
        """What of its prompt was there already; some engines count only when they have answered."""
        if self.tries <= 1:
            self.cached_tokens = max(self.cached_tokens, spent.cached)

    def moved(self, spent: Spent) -> None:
        """What its pages' way to who decodes took, and its first token there."""
        self.phases.queue += spent.waited
        self.phases.transfer += spent.arriving
        self.phases.decode += spent.ran - spent.arriving

    def left(self) -> None:
        """Nobody decodes it any more."""
        self.phases.decode = self._decode
        self.decoding = None

    @property
    def _decode(self) -> float:
        since = self.decoding if self.last is None else self.last
        return self.phases.decode + (0.0 if self.decoding is None or since is None else since - self.decoding)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds by phase as they are now, and from when it came in to its latest token as ``total``."""
        total = 0.0 if self.last is None else self.last - self.began
        return {**asdict(self.phases), "decode": self._decode, "total": total}


@dataclass(slots=True, eq=False)
class Asked:
    """The requests behind one request of a client, and what comes back of them."""

    requests: tuple[Open, ...] = ()
    inbox: asyncio.Queue[Found] = field(default_factory=asyncio.Queue)
    _first: Found | None = None

    async def begun(self) -> None:
        """Returns when there is something to tell; raises what went wrong before."""
        if self._first is None:
            self._first = await self.inbox.get()
        if isinstance(self._first, Exception):
            raise self._first

    async def pieces(self) -> AsyncIterator[tuple[int, Said]]:
        """(which of the requests, token) until all have ended; raises Trouble, or Refused, where one fails."""
        left = len(self.requests)
        while left:
            found = self._first or await self.inbox.get()
            self._first = None
            if isinstance(found, Exception):
                raise found
            left -= found[1].finish is not None
            yield found


@dataclass(slots=True, eq=False)
class Attempt:
    """One order on its way through one or two workers."""

    order: Order
    route: Route
    handle: Handle | None = None
    """Pages that are held for it where it was prefilled."""
    reached: bool = False
    """Whether it was sent to who decodes."""
    arrived: bool = False
    """Whether who decodes has said a token."""
    over: asyncio.Future[Failed | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    """None: it was answered to its end."""

    def lost(self, why: str) -> Failed:
        """A failure that no worker tells."""
        return Failed(order=self.order.id, status=503, code="worker_lost", reason=why, retry=True)

    def blamed(self, failed: Failed) -> str:
        """The worker whose fault a failure is: pages that are not there are missed by who reads them. Empty: nobody's,
        who decodes was busy for as long as they were held."""
        if failed.code == "late":
            return ""
        if self.reached and failed.code not in ("pages_gone", "misfit"):
            return self.route.decode
        return self.route.prefill or self.route.decode
