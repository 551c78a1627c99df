"""What a log's prompts have in common, page by page, under the rows of a family. Counted, not estimated. No torch.

The arithmetic is the page table's: a page can be reused where it and all before it hold the same tokens by the same
writer, in whole pages, and never the last token of a prompt. Every page is kept for ever here: no pool gives more.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from heliostat.bench.logs import WIDTH, Log, Logged
from heliostat.family import BASE, SHARINGS, Row

OWN = "this family"
"""The case of the rows that a log's members have in a family that is there."""
PAGE = 16
"""Tokens of a page, as the engine has it."""


@dataclass(frozen=True, slots=True)
class Case:
    """Rows for all members of a log, and which modules run in one pass."""

    name: str
    rows: Mapping[str, Row]
    weights: Mapping[str, str] = field(default_factory=dict)
    """Module -> the module whose weights run it, where that is another."""

    def passes(self, member: str) -> tuple[str, ...]:
        """Weights that every step of an answer of this member runs through."""
        row = self.rows[member]
        return tuple({self.weights.get(name, name) for name in (row.answer_writer, row.speaker)})


def cases(members: Iterable[str]) -> list[Case]:
    """Every sharing there is, with all members in its row."""
    names = list(members)
    found = []
    for name, sharing in SHARINGS.items():
        own = {member: f"{member}.own" for member in names}
        weights = dict.fromkeys(own.values(), BASE) if sharing.tuner == "lora" else {}
        found.append(Case(name, {m: sharing.instantiate(own[m]) for m in names}, weights))
    return found


class Pages:
    """Numbers whole pages: equal tokens behind equal tokens have one number. 0 is the beginning of all."""

    def __init__(self, size: int = PAGE) -> None:
        self.size = size
        self.before = [0]
        """Page -> the page that it goes on from."""
        self._numbers: dict[tuple[int, bytes], int] = {}

    def path(self, logged: Logged) -> list[int]:
        """Pages of a request's prompt and, where it is known, of its answer without the last token."""
        packed = logged.prompt or b""
        if logged.answer is not None and len(packed) % WIDTH == 0:
            packed += logged.answer
        whole = min(len(packed) // WIDTH, written(logged)) // self.size
        width, numbers, before = self.size * WIDTH, self._numbers, self.before
        # Prompts of one kind have one beginning.
        found, last = [], -1 if logged.kind == "text" else 0
        for place in range(whole):
            key = (last, packed[place * width : (place + 1) * width])
            if (number := numbers.get(key)) is None:
                number = numbers[key] = len(before)
                before.append(max(last, 0))
            found.append(last := number)
        return found


def written(logged: Logged) -> int:
    """Positions of a request whose keys and values are written: the last token is never read again."""
    return logged.prompt_tokens + max(0, logged.answer_tokens - 1)


@dataclass(slots=True)
class Counted:
    """What one case comes to. Tokens."""

    case: str
    prompt: int = 0
    cached_own: int = 0
    """Prompt tokens that need not run because the same member had them written."""
    cached_other: int = 0
    """Prompt tokens that need not run because another member had them written."""
    answer: int = 0
    answer_rows: int = 0
    """Rows of all answers: two for a token where one module writes and another speaks."""
    kept: int = 0
    """Tokens whose keys and values are there in the end, if every page that may be asked for again is kept."""
    peak: int | None = None
    """Most tokens that requests in flight held at once; None where the log does not say how long they took."""
    batch: float | None = None
    """Mean number of requests that one pass of decoding answers, over the time in which any is in flight."""

    @property
    def cached(self) -> int:
        return self.cached_own + self.cached_other

    @property
    def prefill(self) -> int:
        """Prompt tokens that have to run."""
        return self.prompt - self.cached


class Tally:
    """Takes requests in the order of time, for one case."""

    def __init__(self, case: Case, pages: Pages) -> None:
        self.case = case
        self.counted = Counted(case.name)
        self._pages = pages
        self._first: dict[str, dict[int, str]] = {}
        """Writer -> page -> the member for whom it was written first."""
        self._later: list[tuple[float, int, str, Sequence[int], str]] = []
        """(when an answer has ended, n-th, its writer, its pages, member)."""

    def take(self, logged: Logged, path: Sequence[int], *, timed: bool) -> None:
        """One request. ``timed``: its answer's pages are there when it has ended, else at once."""
        found, row = self.counted, self.case.rows[logged.member]
        while self._later and self._later[0][0] <= logged.time:
            self._publish(*heapq.heappop(self._later)[2:])
        first = self._first.setdefault(row.prompt_writer, {})
        for page in path[: max(0, logged.prompt_tokens - 1) // self._pages.size]:
            if (member := first.get(page)) is None:
                break
            if member == logged.member:
                found.cached_own += self._pages.size
            else:
                found.cached_other += self._pages.size
        found.prompt += logged.prompt_tokens
        found.answer += logged.answer_tokens
        found.answer_rows += logged.answer_tokens * (1 + row.two_rows)
        below = max(0, row.boundary(logged.prompt_tokens)) // self._pages.size
        self._publish(row.prompt_writer, path[:below], logged.member)
        rest = path[below : keyed(row, logged, path, self._pages.size)]
        if rest and timed:
            end = logged.time + (logged.seconds or 0.0)
            heapq.heappush(self._later, (end, len(self._later), row.prompt_writer, rest, logged.member))
        elif rest:
            self._publish(row.prompt_writer, rest, logged.member)

    def _publish(self, writer: str, pages: Sequence[int], member: str) -> None:
        first = self._first.setdefault(writer, {})
        for page in reversed(pages):
            if page in first:
                break  # and so is every page that it goes on from
            first[page] = member

    def end(self) -> Counted:
        """When all requests have been taken."""
        while self._later:
            self._publish(*heapq.heappop(self._later)[2:])
        self.counted.kept = self._pages.size * sum(map(len, self._first.values()))
        return self.counted


def keyed(row: Row, logged: Logged, path: Sequence[int], size: int) -> int:
    """How many of a request's pages others may ask for: a prompt finds only pages that its one writer wrote."""
    below = max(0, row.boundary(logged.prompt_tokens)) // size
    return len(path) if row.answers_become_prompts else min(len(path), below)


class Flight:
    """What requests in flight hold, for one case: shared pages once."""

    def __init__(self, case: Case, pages: Pages) -> None:
        self.case = case
        self._pages = pages
        self._holders: dict[str, dict[int, int]] = {}
        """Writer -> page -> how many hold it."""
        self._passes: Counter[str] = Counter()
        self.held = self.peak = 0
        self._last = 0.0
        self._requests = 0
        self._request_seconds = self._pass_seconds = 0.0

    def begin(self, logged: Logged, path: Sequence[int]) -> None:
        """It comes in."""
        self._pass(logged.time)
        self._requests += 1
        self._passes.update(self.case.passes(logged.member))
        self.held += self._private(logged, path) + self._hold(logged, path)
        self.peak = max(self.peak, self.held)

    def end(self, logged: Logged, path: Sequence[int]) -> None:
        """It has been answered."""
        self._pass(logged.time + (logged.seconds or 0.0))
        self._requests -= 1
        self._passes -= Counter(self.case.passes(logged.member))
        self.held -= self._private(logged, path) + self._let_go(logged, path)

    @property
    def batch(self) -> float | None:
        """Mean requests a pass; None where nothing ever took any time."""
        return self._request_seconds / self._pass_seconds if self._pass_seconds else None

    def _pass(self, now: float) -> None:
        span, self._last = now - self._last, now
        if self._requests:
            # A request that runs through two passes a step counts in each.
            self._request_seconds += span * sum(self._passes.values())
            self._pass_seconds += span * len(self._passes)

    def _private(self, logged: Logged, path: Sequence[int]) -> int:
        """Tokens in pages that it shares with nobody."""
        shared = keyed(self.case.rows[logged.member], logged, path, self._pages.size)
        return (-(-written(logged) // self._pages.size) - shared) * self._pages.size

    def _hold(self, logged: Logged, path: Sequence[int]) -> int:
        """Tokens of keyed pages that nobody held before.

        Holders are counted at the last page and where paths meet: a page is held as long as one behind it is.
        """
        holders, page = self._at(logged, path)
        new, before = 0, self._pages.before
        while page:
            held = holders.get(page, 0)
            holders[page] = held + 1
            if held:
                break
            new, page = new + 1, before[page]
        return new * self._pages.size

    def _let_go(self, logged: Logged, path: Sequence[int]) -> int:
        holders, page = self._at(logged, path)
        gone, before = 0, self._pages.before
        while page:
            held = holders.pop(page) - 1
            if held:
                holders[page] = held
                break
            gone, page = gone + 1, before[page]
        return gone * self._pages.size

    def _at(self, logged: Logged, path: Sequence[int]) -> tuple[dict[int, int], int]:
        """(holders of pages of the writer, the request's last page that others may ask for, or 0)."""
        row = self.case.rows[logged.member]
        last = keyed(row, logged, path, self._pages.size)
        return self._holders.setdefault(row.prompt_writer, {}), path[last - 1] if last else 0


def count(log: Log, wanted: Sequence[Case], *, size: int = PAGE, flying: bool = True) -> list[Counted]:
    """All cases over one log. Without ``flying`` nothing is told of what was in flight."""
    pages, timed = Pages(size), log.with_seconds
    tallies = [Tally(case, pages) for case in wanted]
    flights = [Flight(case, pages) for case in wanted] if timed and flying else []
    unended: list[tuple[float, int, Logged, list[int]]] = []
    for number, logged in enumerate(log.requests):
        path = pages.path(logged)
        for tally in tallies:
            tally.take(logged, path, timed=timed)
        if not flights:
            continue
        _ended(flights, unended, logged.time)
        for flight in flights:
            flight.begin(logged, path)
        heapq.heappush(unended, (logged.time + (logged.seconds or 0.0), number, logged, path))
    _ended(flights, unended, float("inf"))
    found = [tally.end() for tally in tallies]
    for counted, flight in zip(found, flights, strict=False):
        counted.peak, counted.batch = flight.peak, flight.batch
    return found


def _ended(
    flights: Sequence[Flight], unended: list[tuple[float, int, Logged, list[int]]], now: float
) -> None:
    while unended and unended[0][0] <= now:
        _, _, logged, path = heapq.heappop(unended)
        for flight in flights:
            flight.end(logged, path)
