"""What a server and a worker say to each other: messages without tensors or pointers, and the Worker itself. No torch.

A worker hosts modules of one family and runs requests through them. The server reaches engines only through this:
an engine in its own process, one in another, or one of another kind altogether. All messages can be sent as bytes.

A worker never puts another module in a missing one's place: it answers ``Failed``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from heliostat.engine.request import Sampling
from heliostat.engine.speculation.wanted import Wanted
from heliostat.family import Row

Role = Literal["prefill", "decode"]
Token = int
Finish = Literal["stop", "length"]


class Described(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a worker is. All but ``modules`` and ``draining`` stay as they are for one life."""

    worker: str
    """Its name in the cluster."""
    incarnation: str
    """Drawn by chance at every start: what an earlier life promised does not hold in this one."""
    engine: str = "embedded"
    """The kind of engine."""
    modules: Mapping[str, str]
    """Engine's name of each module (``math.own#0123456789ab``) -> the engine's digest of it, as page keys have it."""
    roles: tuple[Role, ...]
    fit: str
    """Digest of all that must be equal before pages may travel: shape, tokenizer and template, rope, number format
    of the pages, page size."""
    page_size: int
    """Positions."""
    dtype: str
    """Number format of the pages: ``float32``."""
    pages: int
    page_bytes: int
    max_length: int
    """Most tokens of a request."""
    max_running: int
    credit: int
    """Most handed requests that it takes in before their pages have arrived; more are Failed as ``busy``."""
    hands: bool
    """Whether its pages can be read by other workers of this machine."""
    apart: bool = True
    """Whether it answers prompts that another module wrote than the one which writes their answers."""
    draining: bool = False

    @property
    def abilities(self) -> tuple[str, ...]:
        """Its roles, and ``apart`` where it decodes such requests."""
        return (*self.roles, "apart") if self.apart and "decode" in self.roles else self.roles


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker must know to run one request."""

    id: str
    """Used once: asking again, with the tokens said so far as ``answer``, is another order. The decoding of a handle
    may have the id of its prefill, or another one."""
    member: str = ""
    """Whose counters it goes to; nothing is decided by it."""
    row: Row
    """Over the engine's names of modules."""
    digests: Mapping[str, str]
    """The engine's digest of each module of the row, hosted by this worker or not."""
    prompt: tuple[Token, ...]
    answer: tuple[Token, ...] = ()
    """What was said already, where the request goes on: it is replayed, each token through its own writer, and the
    rest is what it would have been. Only new text is told."""
    sampling: Sampling
    schema: str | None = None
    """JSON schema that the answer must keep to."""
    salt: str = ""
    """The tenant's."""
    speculation: str | None = None
    """The rule by which drafted tokens are taken; None: none are drafted."""
    seconds: float | None = None
    """Left until its deadline, when it was sent; None: there is none."""


class Handle(msgspec.Struct, frozen=True, kw_only=True):
    """Where the pages of a request's positions below the boundary lie, for whoever decodes it.

    Sampling state need not travel: it is a function of the order and its answer.
    """

    order: str
    """As the worker calls it."""
    worker: str
    incarnation: str
    fit: str
    content: str
    """``content_of`` the order: what the pages hold, and who wrote them."""
    store: str
    """Name of the memory that they lie in."""
    tokens: int
    """Positions that are written: the boundary."""
    pages: tuple[int, ...]
    generations: tuple[int, ...]
    """Of each page: a page that was given to somebody else since has a higher one."""
    digests: tuple[bytes, ...]
    """Of each page's bytes."""
    lease: float
    """Seconds for which they are kept, from when this was sent."""
    transfer: str = ""
    """Where an engine of another kind wrote them: what it says of them, as JSON. Pages are then not told."""


def content_of(order: Order) -> str:
    """Digest of all that decides what stands below an order's boundary: writer, tokens, tenant."""
    boundary = order.row.boundary(len(order.prompt))
    facts = (order.digests.get(order.row.prompt_writer), order.prompt[:boundary], order.salt)
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()


class Sampled(msgspec.Struct, frozen=True, array_like=True):
    """A chosen token; log-probabilities (nats) where they were asked for."""

    token: Token
    logprob: float | None = None
    top: tuple[tuple[Token, float], ...] = ()


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """What a request took at one worker before its first token there."""

    waited: float = 0.0
    """Seconds until it was admitted."""
    ran: float = 0.0
    """Seconds from then until the token, or until its pages were ready to be handed over."""
    computed: int = 0
    """Positions that were run."""
    cached: int = 0
    """Prompt tokens whose pages were here already."""
    bytes: int = 0
    """Bytes of pages that were brought in; ``moving``: seconds that this took."""
    moving: float = 0.0
    arriving: float = 0.0
    """Of ``ran``, the seconds until these pages were all here: steps for others in between are part of it."""


class Said(msgspec.Struct, frozen=True, tag=True):
    """A token of an answer."""

    order: str
    number: int
    """Place in the answer, from 0: ``len(order.answer)`` comes first."""
    sampled: Sampled
    text: str
    """Certain text, possibly empty: a character or a stop string may still be open."""
    finish: Finish | None = None
    preemptions: int = 0
    """So far, at this worker."""
    spent: Spent | None = None
    """With the first token that this worker says."""
    speculated: tuple[int, int, int] | None = None
    """With the first token of a step in which tokens were drafted: so many, those taken, and those of them that the
    speaker itself had not chosen."""


class Handed(msgspec.Struct, frozen=True, tag=True):
    """A prefill is done. Its pages are held until they are released or the lease is over."""

    order: str
    handle: Handle | None
    """None where the first token ended the answer, so that nothing is left to decode."""
    spent: Spent
    first: Said | None = None
    """The first token, where the row's prompt_writer chooses it and the order had no answer yet."""


Code = Literal[
    "refused",  # the request can never run so; status 400
    "schema",  # its schema cannot be kept to; status 400
    "module_missing",  # a module that it needs is not hosted here, or has another digest
    "busy",  # too many handed requests wait here already
    "draining",
    "misfit",  # pages of a worker that does not fit this one
    "pages_gone",  # the handle's pages are not there (any more): reassigned, another life, damaged
    "late",  # the lease of its pages was over before it had them here: it waited for its turn
    "pages_lost",  # it lost its pages here to others and its prompt_writer is not hosted here
    "deadline",
    "aborted",  # by the one who asked
    "member_failed",  # its module makes numbers that are none, or its grammar cannot go on
    "engine_failed",  # the worker can answer nothing any more
    "worker_lost",  # no word from the worker, or words of it are missing
]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """A request that ends here without its answer. Never raised: it is said."""

    order: str
    status: int
    """What a client would be told."""
    code: Code
    reason: str
    """For people; names no path and no address."""
    retry: bool = False
    """Whether asking again, here or elsewhere, makes sense: with what was said so far as the order's ``answer``."""


STATUS: dict[Code, int] = {"refused": 400, "schema": 400, "busy": 429, "aborted": 499}
"""What a client is told; 503 else."""
RETRY: frozenset[Code] = frozenset(
    {"module_missing", "busy", "draining", "pages_gone", "late", "pages_lost", "engine_failed", "worker_lost"}
)
"""Where asking again makes sense."""


def no(order: str, code: Code, reason: str) -> Failed:
    """An order that ends without its answer."""
    return Failed(order, STATUS.get(code, 503), code, reason, code in RETRY)


class Stats(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a worker is doing. Counts by member, or by the engine's names of modules; totals since its start."""

    running: Mapping[str, int] = {}
    waiting: Mapping[str, int] = {}
    pages: int = 1
    available: int = 1
    """Pages that a new request could have."""
    leased: int = 0
    """Requests whose pages are held for others to fetch."""
    arriving: int = 0
    """Handed requests whose pages have not all arrived."""
    queued_tokens: int = 0
    """Positions that are known and still to be run."""
    held: Mapping[str, int] = {}
    idle: Mapping[str, int] = {}
    shared_hits: tuple[tuple[str, str, int], ...] = ()
    """(writer, member, tokens)."""
    evictions: int = 0
    rows: Mapping[str, int] = {}
    passes: Mapping[str, int] = {}
    prefixes: tuple[Parting, ...] = ()
    position_seconds: float | None = None
    """Measured seconds to run one more position of a prompt; None: not yet known."""
    step_seconds: float | None = None
    """Measured seconds of a step in which all requests decode."""
    byte_seconds: float | None = None
    """Measured seconds to bring in one byte of pages, checks included."""


class Parting(msgspec.Struct, frozen=True, array_like=True):
    """Where the prompts of two members part, and why (engine/prefixes.py)."""

    member: str
    other: str
    count: int
    common: int
    tokens: int
    shared: int
    outcomes: Mapping[str, int]


Hear = Callable[[Said | Failed], None]
"""Called on the event loop, last with a Said that has ``finish`` or with a Failed."""


class Worker(Protocol):
    """Somebody who runs orders. All methods are called on one event loop, and time is that loop's."""

    async def describe(self) -> Described:
        """What it is now. Raises ConnectionError where it cannot be reached, as do the other coroutines but these
        two."""

    async def prefill(self, order: Order) -> Handed | Failed:
        """Run the positions below the boundary, and keep their pages for a while. Cancelling this aborts the order."""

    async def decode(self, order: Order, hear: Hear, handle: Handle | None = None) -> Failed | None:
        """Take a request in; None: it is, and ``hear`` is told the rest, perhaps before this call has returned.

        With a handle, pages below the boundary are fetched from where they lie. Without one the worker must host the
        prompt_writer (unless no position is below the boundary) and does everything itself.
        """

    def abort(self, order: str) -> None:
        """End an order wherever it stands, and release what it handed over. Nothing is heard of it any more."""

    def release(self, handle: Handle) -> None:
        """The pages of a handle are needed no more. Late or lost words of this are made good by the lease."""

    async def stats(self) -> Stats:
        """What it is doing."""

    async def load(self, modules: Mapping[str, str]) -> Described:
        """Host more modules: the family's names -> digests (of the family) that their files must have. Refused
        where that fails, and nothing is changed."""

    async def unload(self, modules: Sequence[str]) -> Described:
        """Let modules go, by the engine's names. Refused where one is needed by an unfinished request."""

    async def drain(self) -> None:
        """Take nothing more in; returns when all it had is done and no handed page is held."""

    async def close(self) -> None:
        """End it: every open order hears Failed ``worker_lost``."""


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker is started; a process gets it as a line of JSON on its standard input, which stays open while the
    parent lives."""

    family: str
    """Path of its folder."""
    worker: str
    incarnation: str
    modules: Mapping[str, str]
    """The family's names -> digests."""
    roles: tuple[Role, ...] = ("prefill", "decode")
    dtype: str = "auto"
    device: str = "cpu"
    cache_mib: int = 1024
    max_length: int | None = None
    max_running: int = 64
    threads: int | None = None
    """None: as torch likes."""
    memory_mib: int | None = None
    """Most memory for all; None: what the machine has left."""
    hands: bool = True
    """Whether other workers may read its pages; only on a CPU."""
    endpoint: str = ""
    """Path of the socket, in a folder that only this user can enter; empty where it is in the server's process."""
    store_prefix: str = "heliostat"
    """What the name of its memory for pages begins with."""
    lease: float = 30.0
    """Seconds for which handed pages are kept."""
    credit: int = 16
    wanted: Wanted = Wanted()
    """What is drafted."""

    @property
    def store(self) -> str:
        """Name of its memory for pages."""
        return f"{self.store_prefix}-{self.incarnation}"
