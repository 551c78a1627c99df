"""The server without HTTP: who asks, which version answers, how many are in flight, what is loaded and let go."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from heliostat.engine.remembered import Remembered
from heliostat.engine.speculation.wanted import Wanted
from heliostat.errors import Refused
from heliostat.family import Row
from heliostat.model.tokenizer import Tokenizer
from heliostat.serve.crew import Crew, digests_of
from heliostat.serve.dialect import Asking, ChatAsking, Message, TextAsking
from heliostat.serve.dispatch import Dispatcher
from heliostat.serve.dispatch_asked import Asked
from heliostat.serve.forms import schema_of, shown_tools, turns
from heliostat.serve.holding import Holding
from heliostat.serve.keys import OPEN, Keys, Tenant
from heliostat.serve.log import Log
from heliostat.serve.metrics_now import Lives, Snapshot, together
from heliostat.serve.protocol import Order
from heliostat.serve.roster import Roster, Unknown, Version
from heliostat.serve.speaking import ChatShape, Shape, TextShape, Voice
from heliostat.serve.sticky import Sticky
from heliostat.serve.tools import Caller, chosen, forced_schema
from heliostat.serve.trouble import Trouble


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps of what a client may send."""

    body: int = 8 * 2**20
    """Bytes."""
    body_seconds: float = 30.0
    """Longest wait for a body."""


@dataclass(slots=True, eq=False)
class Job:
    """One completion that is being answered."""

    id: str
    asking: Asking
    version: Version
    shape: Shape
    asked: Asked
    voices: list[Voice]
    created: int
    service: Service
    finished: bool = False

    def finish(self) -> None:
        """Must be called, once or more: what is unfinished is aborted."""
        if not self.finished:
            self.finished = True
            self.service.release(self)


@dataclass(slots=True, eq=False)
class Service:
    """Everything between the routes and the engine; lives on the event loop."""

    tokenizer: Tokenizer
    dispatcher: Dispatcher
    crew: Crew
    first: Mapping[str, Row]
    """Members that are served from the start, their rows over the engines' names of modules."""
    roster: Roster = field(default_factory=Roster)
    keys: Keys | None = None
    hosts: frozenset[str] = frozenset()
    """Names under which it may be reached, besides localhost and addresses."""
    limits: Limits = field(default_factory=Limits)
    wanted: Wanted = field(default_factory=Wanted)
    """What is drafted, and by which rules requests may have it taken."""
    log: Log = field(default_factory=Log)
    draining: bool = False
    began: int = field(default_factory=lambda: int(time.time()))
    _started: bool = False
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    remembered: Remembered = field(default_factory=Remembered)
    sticky: Sticky = field(default_factory=Sticky)
    _holding: Holding = field(init=False)
    _lives: Lives = field(default_factory=Lives)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._holding = Holding(self.tokenizer)

    @property
    def ready(self) -> bool:
        """Whether a new request would be taken in, if there is room."""
        return not self.draining and not self.failure

    @property
    def in_flight(self) -> int:
        """Completions that were begun and not yet answered to their end."""
        return self.roster.all_flying

    def tenant(self, authorization: str | None) -> Tenant:
        """Who sends this header; 401 where there are keys and it holds none of them."""
        return OPEN if self.keys is None else self.keys.tenant(authorization or "")

    def find(self, name: str, tenant: Tenant) -> Version:
        """The version behind a name; a member that is not theirs looks as if there were none."""
        if tenant.may(name) and name.partition("@")[0] in self.roster:
            return self.roster.find(name)
        there = sorted(filter(tenant.may, self.roster))
        raise Unknown(f"no member {name!r} is served; there is: {', '.join(there) or 'none'}")

    @property
    def failure(self) -> str:
        """Why nothing can be answered any more; empty while something can."""
        return self.dispatcher.failure or self.crew.failure

    async def start(self) -> None:
        """Begin to work, for the loop that is running; nothing where that was done already."""
        if self._started:
            return
        self._started = True
        await self.crew.start()
        for member, row in self.first.items():
            digests = digests_of(row, self.dispatcher.described.values())
            self.roster.add(Version(member, row, digests, member))

    async def stop(self) -> None:
        """Abort what is unfinished, and end the workers."""
        await self.dispatcher.stop()
        await self.crew.stop()

    async def look(self) -> Snapshot:
        """How it is now, or was last where a worker does not say so in time; kept for Prometheus, too."""
        metrics = self.dispatcher.metrics
        found = await self.dispatcher.stats()
        if found or not self.dispatcher.workers:
            there = {name: described.incarnation for name, described in self.dispatcher.described.items()}
            metrics.snapshot = together(
                self._lives.note(found, there),
                waiting=self.dispatcher.members_waiting(),
                recalls=asdict(self.remembered.recalls),
                workers=self.crew.standing(found),
            )
        return metrics.snapshot

    # ---- completions

    async def chat(self, asking: ChatAsking, tenant: Tenant) -> Job:
        """Take a conversation in."""
        tools = shown_tools(asking)
        forced = chosen(tools, asking.tool_choice)
        schema = forced_schema(forced) if forced else schema_of(asking, tools)
        with self._entered(asking, tenant) as version:
            ids = await asyncio.to_thread(self._conversation, asking.messages, tools, tenant.salt)
            shape = ChatShape(self.tokenizer, asking.top_logprobs_wanted is not None)
            held = await self._holding.checked(schema, "tool_choice" if forced else "response_format")
            orders = self._orders(shape.prefix, asking, version, tenant, [ids], held)
            caller = partial(Caller, listening=bool(tools), forced=bool(forced))
            return self._job(asking, version, orders, shape, caller)

    async def complete(self, asking: TextAsking, tenant: Tenant) -> Job:
        """Take bare prompts in."""
        schema = schema_of(asking, ())
        with self._entered(asking, tenant) as version:
            prompts = await asyncio.to_thread(lambda: [self._bare(prompt) for prompt in asking.prompts])
            shape = TextShape(self.tokenizer, asking.logprobs is not None)
            held = await self._holding.checked(schema, "response_format")
            orders = self._orders(shape.prefix, asking, version, tenant, prompts, held)
            return self._job(asking, version, orders, shape, partial(Caller, listening=False))

    def _conversation(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], salt: str
    ) -> Sequence[int]:
        """Ids of a conversation; answers of ours in it stand as they were said, so that their pages are found."""
        return self.remembered.prompt_ids(self.tokenizer, turns(messages), salt=salt, tools=tools)

    async def remember(self, job: Job) -> None:
        """Keep the ids of an answer that has ended, for when it comes back as text."""
        await asyncio.to_thread(self._remember, job)
        salt = job.asked.requests[0].order.salt
        said = [(voice.text, voice.caller.calls) for voice in job.voices]
        self.sticky.said(job.asking, job.version, salt, said)

    def _remember(self, job: Job) -> None:
        for request, voice in zip(job.asked.requests, job.voices, strict=True):
            if voice.text and not voice.caller.calls:
                self.remembered.remember(self.tokenizer, voice.text, request.answer, salt=request.order.salt)

    def _bare(self, prompt: str | list[int]) -> list[int]:
        return self.tokenizer.plain_prompt_ids(prompt) if isinstance(prompt, str) else list(prompt)

    @contextmanager
    def _entered(self, asking: Asking, tenant: Tenant) -> Iterator[Version]:
        """The version that answers, kept until the job that comes of it is finished, or there is none."""
        if self.draining:
            raise Trouble(503, "the server is shutting down: ask another one", code="draining")
        if self.failure:
            raise Trouble(503, self.failure, code="engine_failed")
        self.find(asking.model, tenant)
        self.dispatcher.refuse_if_full(asking.choices)  # before any work is done for it
        version = self.sticky.choose(self.roster, asking, tenant.salt)
        self.roster.begin(version)
        try:
            yield version
        except BaseException:
            self._left(version)
            raise

    def _left(self, version: Version) -> None:
        self.roster.end(version)
        seat = self.roster.seats.get(version.member)
        if seat is None or version not in seat.versions:
            self._later(self.tidy())

    def _job(
        self,
        asking: Asking,
        version: Version,
        orders: Sequence[Order],
        shape: Shape,
        caller: Callable[[], Caller],
    ) -> Job:
        asked = self.dispatcher.ask(orders)
        every = bool(asking.return_token_ids)
        voices = [Voice(caller(), self.tokenizer.eos_ids, every) for _ in orders]
        name = orders[0].id.rpartition("/")[0]
        return Job(name, asking, version, shape, asked, voices, int(time.time()), self)

    def release(self, job: Job) -> None:
        """It is over: abort what is unfinished, let go of its version."""
        self.dispatcher.abort(job.asked)
        self._left(job.version)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _orders(
        self,
        prefix: str,
        asking: Asking,
        version: Version,
        tenant: Tenant,
        prompts: Sequence[Sequence[int]],
        schema: str | None,
    ) -> list[Order]:
        name = prefix + secrets.token_hex(12)
        first, rule = asking.sampling(most=self.dispatcher.max_length), self._rule(asking)
        most = self.dispatcher.most
        if len(prompts) * asking.choices > most:
            raise Trouble(400, f"{len(prompts)} prompts with n {asking.choices}; at most {most}", "n")
        return [
            Order(
                id=f"{name}/{place}-{choice}",
                row=version.row,
                digests=version.digests,
                prompt=tuple(prompt),
                sampling=replace(first, choice=choice),
                schema=schema,
                member=version.member,
                salt=tenant.salt,
                speculation=rule,
            )
            for place, prompt in enumerate(prompts)
            for choice in range(asking.choices)
        ]

    def _rule(self, asking: Asking) -> str | None:
        """By which rule drafted tokens are taken for a request; 400 where it asks for what is not allowed."""
        try:
            rule = self.wanted.rule(asking.speculation)
        except Refused as refused:
            raise Trouble(400, str(refused), "speculation") from refused
        return None if rule is None else str(rule)

    # ---- members

    async def load(self, member: str, source: str | None = None) -> Version:
        """Serve one more member of the family."""
        async with self._change():
            if member in self.roster:
                raise Refused(f"{member!r} is served already: roll it to a newer version, or unload it")
            return self.roster.add(await self._arrived(member, source or member))

    async def roll(self, member: str, source: str | None = None) -> Version:
        """Let a newer version of a member take its place."""
        async with self._change():
            self.roster.seat(member)
            return self.roster.roll(await self._arrived(member, source or member))

    async def canary(self, member: str, share: float, source: str | None = None) -> None:
        """Try a newer version on a share of a member's requests; a share of 0 ends it."""
        async with self._change():
            self.roster.seat(member)
            if share == 0:
                self.roster.call_off(member)
            else:
                self.roster.try_out(await self._arrived(member, source or member), share=share)

    async def unload(self, member: str) -> None:
        """Serve a member no more; its memory goes when the last request in flight has ended."""
        async with self._change():
            self.roster.drop(member)

    @asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        """One change at a time; what it loaded in vain, or made superfluous, goes again."""
        try:
            async with self._changing:
                yield
        finally:
            await self.tidy()

    async def _arrived(self, member: str, source: str) -> Version:
        try:
            row, digests = await self.crew.host(source)
        except Refused as error:  # where the folder lies is not for clients to know
            raise Refused(str(error).replace(str(self.crew.folder), "FAMILY")) from error
        return Version(member, row, digests, source)

    async def tidy(self) -> None:
        """Let modules go that nobody needs any more."""
        async with self._changing:
            await self.crew.keep_only(self.roster.needed())
