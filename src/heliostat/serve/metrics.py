"""What Prometheus reads: counters and times by member, gauges of the engine as it stands, aliases of other names."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from heliostat.engine.engine import Piece
from heliostat.engine.prefixes import Meetings
from heliostat.engine.request import Request

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
OURS, THEIRS = "heliostat_", "vllm:"
ALIASES = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "generation_tokens",
    "num_preemptions",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
)
"""Also told under a second prefix and with the label that dashboards made for vLLM know."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine at one moment, as its owner saw it."""

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
    prefixes: Mapping[tuple[str, str], Meetings] = field(default_factory=dict)
    """(member, member) -> what their prompts had in common."""

    @property
    def usage(self) -> float:
        """Share of pages that requests hold."""
        return 1 - self.available / self.pages


class Metrics:
    """A registry of its own, fed piece by piece."""

    def __init__(self, members: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self.snapshot = Snapshot()
        self.members = set(members)
        self._began: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self.first = self._histogram("time_to_first_token_seconds", "To the first token", SECONDS)
        self.gap = self._histogram("inter_token_latency_seconds", "Between tokens", GAPS)
        self.whole = self._histogram("e2e_request_latency_seconds", "To the last token", SECONDS)
        self.queries = self._counter("prefix_cache_queries", "Prompt tokens that were looked up")
        self.hits = self._counter("prefix_cache_hits", "Prompt tokens that did not have to run")
        self.prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self.spoken = self._counter("generation_tokens", "Tokens of answers")
        self.preemptions = self._counter("num_preemptions", "Requests that gave up their pages for a while")
        self.ended = self._counter("request_success", "Answers that ended", "finished_reason")
        self.refused = Counter(
            f"{OURS}requests_refused", "Requests not taken in", ["status"], registry=self.registry
        )
        self.registry.register(_Now(self))
        self._aliases = CollectorRegistry()
        self._aliases.register(_Aliases(self.registry))

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(OURS + name, about, ["member", *labels], registry=self.registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(OURS + name, about, ["member"], buckets=buckets, registry=self.registry)

    def text(self) -> bytes:
        """All of it in Prometheus' format."""
        return generate_latest(self.registry) + generate_latest(self._aliases)

    def begin(self, request: Request, now: float) -> None:
        """A request came in."""
        self.members.add(request.member)
        self._began[request.id] = now

    def piece(self, piece: Piece, now: float) -> None:
        """A step added to an answer."""
        request, member = piece.request, piece.request.member
        self.spoken.labels(member).inc()
        if (last := self._last.get(request.id)) is not None:
            self.gap.labels(member).observe(now - last)
        elif (began := self._began.get(request.id)) is not None:
            self.first.labels(member).observe(now - began)
            self._count_prompt(request)
        self._last[request.id] = now
        if piece.finish_reason is not None:
            self.whole.labels(member).observe(now - self._began.get(request.id, now))
            self.ended.labels(member, piece.finish_reason).inc()
            self.end(request)

    def _count_prompt(self, request: Request) -> None:
        for counter in (self.prompt, self.queries):
            counter.labels(request.member).inc(len(request.prompt))
        self.hits.labels(request.member).inc(request.cached_tokens)

    def end(self, request: Request) -> None:
        """A request is gone, answered or not."""
        if self._began.pop(request.id, None) is not None and request.preemptions:
            self.preemptions.labels(request.member).inc(request.preemptions)
        self._last.pop(request.id, None)

    def average(self, histogram: Histogram) -> dict[str, float]:
        """Mean seconds by member, of those who have any."""
        sums: dict[str, dict[str, float]] = {}
        for metric in histogram.collect():
            for sample in metric.samples:
                sums.setdefault(sample.labels["member"], {})[sample.name.rpartition("_")[2]] = sample.value
        return {member: s["sum"] / s["count"] for member, s in sums.items() if s.get("count")}


class _Now(Collector):
    """Gauges and counters out of the latest snapshot."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """Asked for at every scrape."""
        now = self._metrics.snapshot
        everyone = Tally(dict.fromkeys(self._metrics.members, 0))
        yield _gauge("num_requests_running", "Requests in the batch", "member", {**everyone, **now.running})
        yield _gauge("num_requests_waiting", "Requests in the queue", "member", {**everyone, **now.waiting})
        yield GaugeMetricFamily(
            f"{OURS}kv_cache_usage_perc", "Share of pages that requests hold (0 to 1)", now.usage
        )
        yield GaugeMetricFamily(f"{OURS}pages", "Pages of the pool", now.pages)
        yield _gauge("held_pages", "Pages that requests hold, by who wrote them", "writer", now.held)
        yield _gauge(
            "idle_pages", "Pages kept for who asks for the same again, by writer", "writer", now.idle
        )
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


class _Aliases(Collector):
    """The same numbers under the names that other dashboards ask for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """Asked for at every scrape."""
        for metric in self._registry.collect():
            if metric.name.removeprefix(OURS) not in ALIASES:
                continue
            alias = Metric(
                metric.name.replace(OURS, THEIRS, 1), metric.documentation, metric.type, metric.unit
            )
            for sample in metric.samples:
                labels = {("model_name" if k == "member" else k): v for k, v in sample.labels.items()}
                alias.add_sample(sample.name.replace(OURS, THEIRS, 1), labels, sample.value)
            yield alias


def _parting(prefixes: Mapping[tuple[str, str], Meetings]) -> Iterator[Metric]:
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


def _gauge(name: str, about: str, label: str, values: Mapping[str, int]) -> Metric:
    return _filled(GaugeMetricFamily(OURS + name, about, labels=[label]), values)


def _counter(name: str, about: str, label: str, values: Mapping[str, int]) -> Metric:
    return _filled(CounterMetricFamily(OURS + name, about, labels=[label]), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, int]) -> Metric:
    for value, count in sorted(values.items()):
        family.add_metric([value], count)
    return family
