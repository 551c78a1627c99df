"""The workers at one moment, put together for people and for Prometheus: by the names of the family. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from heliostat.serve.protocol import Parting, Stats
from heliostat.serve.roster import family_name

OURS = "heliostat_"


@dataclass(frozen=True, slots=True)
class Standing:
    """One worker, as the server sees it."""

    name: str
    state: str
    """``up``, ``resting`` (it failed, and is left alone for a while), ``starting`` or ``given up``."""
    roles: tuple[str, ...]
    modules: tuple[str, ...]
    """By the family's names."""
    decoding: int = 0
    """Requests."""
    ahead: int = 0
    """Prompt tokens that it was sent and has not run."""
    restarts: int = 0
    pages: int = 0
    available: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All workers together at one moment."""

    running: Mapping[str, int] = field(default_factory=dict)
    """Member -> requests; ``waiting`` alike."""
    waiting: Mapping[str, int] = field(default_factory=dict)
    pages: int = 1
    available: int = 1
    """Pages that a new request could have: free ones, and kept ones that nobody reads now."""
    held: Mapping[str, int] = field(default_factory=dict)
    """Writer -> pages that running requests hold."""
    idle: Mapping[str, int] = field(default_factory=dict)
    """Writer -> pages that nobody holds, kept for those who ask for the same again."""
    shared_hits: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(writer, member) -> tokens that this member took from pages first written for another."""
    evictions: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    """Module -> rows run through it so far; ``passes`` alike."""
    passes: Mapping[str, int] = field(default_factory=dict)
    recalls: Mapping[str, int] = field(default_factory=dict)
    """What came of answers that returned in conversations -> how many."""
    prefixes: Mapping[tuple[str, str], Parting] = field(default_factory=dict)
    """(member, member) -> what their prompts had in common."""
    workers: tuple[Standing, ...] = ()

    @property
    def usage(self) -> float:
        """Share of pages that requests hold."""
        return 1 - self.available / self.pages


_NOTHING = Stats(pages=0, available=0)


class Lives:
    """What each life of a worker counted, so that no total falls when one is silent for a while or starts again."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, Stats]] = {}
        """Worker -> its latest incarnation that said something, and what."""
        self._ended = _NOTHING
        """Totals of the lives before those."""

    def note(self, told: Mapping[str, Stats], there: Mapping[str, str]) -> Iterator[Stats]:
        """``told``: worker -> what it says; ``there``: worker -> incarnation. Everybody's latest word, of those that
        are not there only the totals, and the totals of all earlier lives."""
        for name, stats in told.items():
            if name not in there:
                continue
            life, last = self._last.get(name, ("", None))
            if last is not None and life != there[name]:
                self._ended = _totals(self._ended, last)
            self._last[name] = there[name], stats
        for name, (life, last) in self._last.items():
            yield last if there.get(name) == life else _totals(last)
        yield self._ended


def _totals(one: Stats, other: Stats = _NOTHING) -> Stats:
    """What both counted; nothing runs there, and no page is theirs."""
    hits: Counter[tuple[str, str]] = Counter()
    for writer, member, tokens in (*one.shared_hits, *other.shared_hits):
        hits[writer, member] += tokens
    return Stats(
        pages=0,
        available=0,
        shared_hits=tuple((*pair, tokens) for pair, tokens in hits.items()),
        evictions=one.evictions + other.evictions,
        rows=_sum((one.rows, other.rows)),
        passes=_sum((one.passes, other.passes)),
        prefixes=tuple(_meetings((*one.prefixes, *other.prefixes)).values()),
    )


def together(
    stats: Iterable[Stats],
    *,
    waiting: Iterable[str] = (),
    recalls: Mapping[str, int] | None = None,
    workers: tuple[Standing, ...] = (),
) -> Snapshot:
    """What several workers do, as one; ``waiting``: members of requests that no worker has yet."""
    stats = tuple(stats)
    hits: Counter[tuple[str, str]] = Counter()
    for writer, member, tokens in (hit for one in stats for hit in one.shared_hits):
        hits[family_name(writer), member] += tokens
    return Snapshot(
        running=_sum(one.running for one in stats),
        waiting=_sum([*(one.waiting for one in stats), Counter(waiting)]),
        pages=sum(one.pages for one in stats) or 1,
        available=sum(one.available for one in stats) if any(one.pages for one in stats) else 1,
        held=_by_family(one.held for one in stats),
        idle=_by_family(one.idle for one in stats),
        shared_hits=hits,
        evictions=sum(one.evictions for one in stats),
        rows=_by_family(one.rows for one in stats),
        passes=_by_family(one.passes for one in stats),
        recalls=recalls or {},
        prefixes=_meetings(met for one in stats for met in one.prefixes),
        workers=workers,
    )


def _sum(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for one in counts:
        found.update(one)
    return found


def _by_family(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    """Counts by engine's modules -> by the family's, of which several versions may be loaded."""
    found: Counter[str] = Counter()
    for one in counts:
        for module, count in one.items():
            found[family_name(module)] += count
    return found


def _meetings(partings: Iterable[Parting]) -> dict[tuple[str, str], Parting]:
    found: dict[tuple[str, str], Parting] = {}
    for new in partings:
        pair = new.member, new.other
        old = found.get(pair)
        found[pair] = new if old is None else _added(old, new)
    return found


def _added(one: Parting, other: Parting) -> Parting:
    return Parting(
        one.member,
        one.other,
        one.count + other.count,
        one.common + other.common,
        one.tokens + other.tokens,
        one.shared + other.shared,
        Counter(one.outcomes) + Counter(other.outcomes),
    )


def told(now: Snapshot, members: Iterable[str]) -> Iterator[Metric]:
    """A snapshot as gauges and counters; ``members`` have some even while they have no request."""
    everyone = dict.fromkeys(members, 0)
    yield _gauge("num_requests_running", "Requests in the batch", "member", {**everyone, **now.running})
    yield _gauge("num_requests_waiting", "Requests in the queue", "member", {**everyone, **now.waiting})
    yield GaugeMetricFamily(
        f"{OURS}kv_cache_usage_perc", "Share of pages that requests hold (0 to 1)", now.usage
    )
    yield GaugeMetricFamily(f"{OURS}pages", "Pages of the pool", now.pages)
    yield _gauge("held_pages", "Pages that requests hold, by who wrote them", "writer", now.held)
    yield _gauge("idle_pages", "Pages kept for who asks for the same again, by writer", "writer", now.idle)
    yield CounterMetricFamily(f"{OURS}evictions", "Kept pages that were given up", now.evictions)
    yield _counter("rows", "Rows run through a module", "module", now.rows)
    yield _counter("passes", "Passes in which a module had rows", "module", now.passes)
    yield _counter("recalled_answers", "Answers that returned in conversations", "outcome", now.recalls)
    hits = CounterMetricFamily(
        f"{OURS}cross_member_hit_tokens",
        "Tokens taken from pages first written for another member",
        labels=["writer", "member"],
    )
    for (writer, member), tokens in now.shared_hits.items():
        hits.add_metric([writer, member], tokens)
    yield hits
    yield from _parting(now.prefixes)
    yield from _standing(now.workers)


def _parting(prefixes: Mapping[tuple[str, str], Parting]) -> Iterator[Metric]:
    """What the prompts of two members have in common, and why one finds no page of the other."""
    pair = ["member", "other"]
    common = CounterMetricFamily(
        f"{OURS}prefix_common_tokens", "Tokens that prompts of two members began with alike", labels=pair
    )
    meetings = CounterMetricFamily(
        f"{OURS}prefix_meetings",
        "Prompts that were laid beside those of another member",
        labels=[*pair, "outcome"],
    )
    for (member, other), met in sorted(prefixes.items()):
        common.add_metric([member, other], met.common)
        for outcome, count in sorted(met.outcomes.items()):
            meetings.add_metric([member, other, outcome], count)
    yield common
    yield meetings


def _standing(workers: Iterable[Standing]) -> Iterator[Metric]:
    up = GaugeMetricFamily(
        f"{OURS}worker_up", "1 for a worker that takes requests, else 0", labels=["worker", "roles"]
    )
    decoding = GaugeMetricFamily(f"{OURS}worker_requests", "Requests that it decodes", labels=["worker"])
    ahead = GaugeMetricFamily(
        f"{OURS}worker_prompt_tokens", "Prompt tokens that it was sent and has not run", labels=["worker"]
    )
    restarts = CounterMetricFamily(f"{OURS}worker_restarts", "Times it was started again", labels=["worker"])
    for one in workers:
        up.add_metric([one.name, "+".join(one.roles)], one.state == "up")
        decoding.add_metric([one.name], one.decoding)
        ahead.add_metric([one.name], one.ahead)
        restarts.add_metric([one.name], one.restarts)
    yield from (up, decoding, ahead, restarts)


def _gauge(name: str, about: str, label: str, values: Mapping[str, int]) -> Metric:
    return _filled(GaugeMetricFamily(OURS + name, about, labels=[label]), values)


def _counter(name: str, about: str, label: str, values: Mapping[str, int]) -> Metric:
    return _filled(CounterMetricFamily(OURS + name, about, labels=[label]), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, int]) -> Metric:
    for value, count in sorted(values.items()):
        family.add_metric([value], count)
    return family
