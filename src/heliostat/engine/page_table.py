"""Which page holds what: numbered pages, writer-chained keys, reference counts, eviction. No torch.

A page may be reused exactly when its writer and tokens, and those of every page before it, are equal: the key
says all of that, so nobody else needs to know which row a page came from.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from heliostat.engine.idle import Idle
from heliostat.engine.request import Request
from heliostat.errors import Refused


def page_key(previous: bytes, *, writer: str, tokens: Sequence[int], salt: str) -> bytes:
    """SHA-256 (32 bytes) that names what a page holds.

    ``previous`` is the key of the page before it, empty for the first; ``writer`` a module digest; ``tokens``
    the ids of the whole page. Every field goes in with a tag and its length, so no two lists look alike.
    """
    packed = struct.pack(f"<{len(tokens)}q", *tokens)
    digest = hashlib.sha256()
    fields = ((b"P", previous), (b"W", writer.encode()), (b"T", packed), (b"S", salt.encode()))
    for tag, value in fields:
        digest.update(tag + struct.pack("<Q", len(value)) + value)
    return digest.digest()


@dataclass(slots=True)
class Counters:
    """What the cache was asked for and gave. What a preempted request finds again is not counted."""

    queries: int = 0
    """Tokens of the prompts that were admitted."""
    hit_tokens: int = 0
    """Of these, tokens that did not have to run."""
    shared_hits: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(writer, member) -> tokens that this member took from pages first written for another member."""
    evictions: int = 0
    """Pages."""


@dataclass(slots=True)
class Written:
    """Pages of one writer."""

    held: int = 0
    """Requests refer to them."""
    idle: int = 0
    """Kept for those who ask for the same again."""


@dataclass(frozen=True, slots=True)
class _Published:
    """What a keyed page is: its key, that of the page before it, and for whom it was first written by whom."""

    key: bytes
    previous: bytes
    writer: str
    member: str


class Generations(Protocol):
    """A number for each page, which others may be looking at."""

    def __getitem__(self, page: int, /) -> int: ...

    def __setitem__(self, page: int, generation: int, /) -> None: ...


class PageTable:
    """A pool of ``pages`` pages of ``page_size`` positions each (S).

    A page is in exactly one of three places: free (nobody refers to it, it holds nothing), held (at least one
    request refers to it) or idle (nobody refers to it, but its key may be asked for again).

    Only full pages are ever shared, and what follows a shared prefix goes into fresh pages. So copy-on-write
    never copies: whoever writes on after a shared page does so in a page of its own (``assert_writable``).

    A page is no use without those before it. So an idle page is lost before the idle ones that it goes on from: it
    has been found at most as often as they, and came to rest no later.
    """

    def __init__(self, pages: int, *, page_size: int, generations: Generations | None = None) -> None:
        """``generations`` [P]: a page's is raised whenever it is given out to be written."""
        if pages < 1 or page_size < 1:
            raise Refused(f"a pool of {pages} pages of {page_size} positions; both must be at least 1")
        self.pages = pages
        self.page_size = page_size
        self.counters = Counters()
        self.version = 0
        """Raised whenever a key comes or goes."""
        self.generations: Generations = [0] * pages if generations is None else generations
        self._free = list(range(pages - 1, -1, -1))
        self._idle = Idle()
        self._hits = [0] * pages
        # Hits of keys that were lost, as many as there are pages: asked for again, they were lost too early.
        self._lost: OrderedDict[bytes, int] = OrderedDict()
        self._references = [0] * pages
        self._published: list[_Published | None] = [None] * pages
        self._by_key: dict[bytes, int] = {}
        self._after: dict[bytes, set[int]] = {}
        """Cached pages that go on from a key, cached itself or not; beginnings go on from none."""

    def pages_for(self, positions: int) -> int:
        return -(-positions // self.page_size)

    def available(self, *, without: Collection[int] = ()) -> int:
        """Pages that allocate can give; idle ones among ``without`` are spoken for and do not count."""
        return len(self._free) + len(self._idle) - sum(page in self._idle for page in without)

    def pages_by_writer(self, holders: Iterable[Request]) -> dict[str, Written]:
        """Held and idle pages by the module that writes them, as it is called; ``holders`` are all that hold any.

        A page of two writers counts for the first, a shared one for the one who wrote it first.
        """
        writers = {page: r.writer_of(n * self.page_size) for r in holders for n, page in enumerate(r.pages)}
        writers |= {page: p.writer for page in writers if (p := self._published[page]) is not None}
        found: dict[str, Written] = {}
        for writer in writers.values():
            found.setdefault(writer, Written()).held += 1
        for page in self._idle:
            published = self._published[page]
            assert published is not None, f"idle page {page} has no key"
            found.setdefault(published.writer, Written()).idle += 1
        return found

    def key_of(self, request: Request, index: int) -> bytes | None:
        """Key of the request's page ``index``, all of whose tokens are known.

        None for a page that two writers share and for every page after one: such pages are never shared.
        """
        for number in range(len(request.page_keys), index + 1):
            request.page_keys.append(self._next_key(request, number))
        return request.page_keys[index]

    def _next_key(self, request: Request, number: int) -> bytes | None:
        previous = request.page_keys[number - 1] if number else b""
        start, stop = number * self.page_size, (number + 1) * self.page_size
        assert stop <= request.length, f"page {number} of {request.id!r} is not full yet"
        # There is one boundary, so the ends of the page tell whether it lies inside.
        writer = request.digests[request.writer_of(start)]
        if previous is None or writer != request.digests[request.writer_of(stop - 1)]:
            return None
        return page_key(previous, writer=writer, tokens=request.token_ids(start, stop), salt=request.salt)

    def match(self, request: Request) -> list[int]:
        """The longest run of cached pages that continues ``request.pages``; changes nothing.

        The last known token is never taken from the cache, unless it is not to run here.
        """
        found: list[int] = []
        for index in range(len(request.pages), request.cacheable // self.page_size):
            key = self.key_of(request, index)
            page = None if key is None else self._by_key.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def take(self, request: Request, pages: Sequence[int]) -> None:
        """Refer to ``pages``, just matched for ``request``, once more each."""
        for page in pages:
            self._references[page] += 1
            self._idle.remove(page)
            if not request.preemptions:
                self._hits[page] += 1
                self._count_hit(page, request.member)
        if pages:
            self._raise_before(pages[0])

    def _count_hit(self, page: int, member: str) -> None:
        published = self._published[page]
        assert published is not None, f"page {page} was matched without a key"
        self.counters.hit_tokens += self.page_size
        if published.member != member:
            self.counters.shared_hits[published.writer, member] += self.page_size

    def allocate(self, count: int) -> list[int]:
        """``count`` empty pages with one reference each; the caller has asked ``available`` before."""
        assert count <= self.available(), f"{count} pages of {self.available()}"
        pages = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
            self.generations[page] += 1  # before anything is written: who still reads it can tell
        return pages

    def _evict(self) -> int:
        page = self._idle.pop()
        published = self._published[page]
        assert published is not None and not self._references[page]
        del self._by_key[published.key]
        self.version += 1
        self._part(page, published.previous)
        self._lost[published.key] = self._hits[page]
        if len(self._lost) > self.pages:
            self._lost.popitem(last=False)
        self._published[page], self._hits[page] = None, 0
        self.counters.evictions += 1
        return page

    def _part(self, page: int, previous: bytes) -> None:
        """A cached page goes on from ``previous`` no more."""
        if previous:
            self._after[previous].discard(page)
            if not self._after[previous]:
                del self._after[previous]

    def _before(self, page: int) -> int | None:
        """The cached page that a cached one goes on from; it may be a twin of the one its holders have."""
        published = self._published[page]
        return None if published is None else self._by_key.get(published.previous)

    def _raise_before(self, page: int) -> None:
        """Count what a page goes on from as found no less often."""
        while (before := self._before(page)) is not None and self._hits[before] < self._hits[page]:
            self._hits[before] = self._hits[page]
            page = before

    def _rest(self, page: int) -> None:
        """Nobody holds the page any more. Idle ones that it goes on from, twins of its holder's, stay longer."""
        self._idle.add(page, hits=self._hits[page])
        while (before := self._before(page)) is not None and before in self._idle:
            self._idle.remove(before)
            self._idle.add(before, hits=self._hits[before], after=page)
            page = before

    def publish(self, request: Request, index: int) -> None:
        """Offer the request's page ``index`` to others; it is full and its keys and values are written.

        A twin of a page that is cached already stays private.
        """
        key, page = self.key_of(request, index), request.pages[index]
        if key is None or key in self._by_key:
            return
        self._by_key[key] = page
        self.version += 1
        previous = request.page_keys[index - 1] if index else b""
        assert previous is not None, "a page behind one without a key has none"
        writer = request.writer_of(index * self.page_size)
        self._published[page] = _Published(key, previous, writer, request.member)
        if previous:
            self._after.setdefault(previous, set()).add(page)
        if key in self._lost:  # what a preempted request lost and makes again was not found by another
            self._hits[page] = self._lost.pop(key) + (not request.preemptions)
        # Pages that go on from it may have stayed while it was lost: found by way of a twin, they count for it, too.
        self._hits[page] = max([self._hits[page], *(self._hits[after] for after in self._after.get(key, ()))])
        self._raise_before(page)

    def release(self, pages: Sequence[int]) -> None:
        """Give up one reference to each of a request's pages, in the order of positions."""
        # From the end: what came to rest first is lost first.
        for page in reversed(pages):
            self._references[page] -= 1
            assert self._references[page] >= 0, f"page {page} was released more often than held"
            if self._references[page]:
                continue
            if self._published[page] is None:
                self._free.append(page)
            else:
                self._rest(page)

    def assert_writable(self, pages: Sequence[int]) -> None:
        """A page that is written has one holder and no key: nobody else reads it, now or later."""
        for page in pages:
            assert self._references[page] == 1, f"page {page} has {self._references[page]} holders"
            assert self._published[page] is None, f"page {page} is published"
